//! What is wrong with a disk, where it is the disk.

use std::io::ErrorKind;

/// Why a disk does not do what a healthy one would. It may be mended while the server runs; a wrong path is none of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    /// No room is left, or none of what this user may have.
    Full,
    ReadOnly,
    /// The permission is missing.
    Denied,
}

impl DiskFault {
    /// What the first cause of an error that tells of a disk says.
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        std::iter::successors(Some(error), |error| error.source())
            .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
            .find_map(|error| match error.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(Self::Full),
                ErrorKind::ReadOnlyFilesystem => Some(Self::ReadOnly),
                ErrorKind::PermissionDenied => Some(Self::Denied),
                _ => None,
            })
    }
}

/// In words for clients too: what is wrong, and how it is mended.
impl std::fmt::Display for DiskFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Full => "the disk that holds states is full; it needs free space",
            Self::ReadOnly => "the disk that holds states is read-only; it has to be mounted writable",
            Self::Denied => "the server may not use the folder that holds states; it needs the permission",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn a_disk_is_told_from_other_causes_however_deep_it_is_named() {
        let full = || Error::from(ErrorKind::StorageFull);
        let wrapped = object_store::Error::Generic { store: "x", source: Box::new(full()) };
        assert_eq!((DiskFault::of(&full()), DiskFault::of(&wrapped)), (Some(DiskFault::Full), Some(DiskFault::Full)));
        let kinds = [
            (ErrorKind::QuotaExceeded, Some(DiskFault::Full)),
            (ErrorKind::ReadOnlyFilesystem, Some(DiskFault::ReadOnly)),
            (ErrorKind::PermissionDenied, Some(DiskFault::Denied)),
            (ErrorKind::NotADirectory, None),
            (ErrorKind::AlreadyExists, None),
        ];
        for (kind, fault) in kinds {
            assert_eq!(DiskFault::of(&Error::from(kind)), fault);
        }
    }
}
