//! Lists, a page at a time.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Error;
use crate::session::{Listing, Page};

const DEFAULT_LIMIT: usize = 20;
const LARGEST_LIMIT: usize = 100;

/// Which page of a list.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// How many at most, 1 to 100; 20 by default.
    #[param(minimum = 1, maximum = 100)]
    pub limit: Option<usize>,
    /// Only what comes after this id; `last_id` of the page before.
    pub after: Option<String>,
}

/// Checks a page; `limit` must be 1 to 100.
pub fn page(limit: Option<usize>, after: Option<String>) -> Result<Page, Error> {
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=LARGEST_LIMIT).contains(&limit) {
        return Err(Error::invalid("limit", format!("`limit` must be from 1 to {LARGEST_LIMIT}, not {limit}")));
    }
    Ok(Page { limit, after })
}

/// One page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct List<T> {
    /// `list`.
    #[schema(value_type = String)]
    pub object: &'static str,
    pub data: Vec<T>,
    pub has_more: bool,
    /// Null when the page is empty.
    #[schema(required = true)]
    pub first_id: Option<String>,
    /// Null when the page is empty.
    #[schema(required = true)]
    pub last_id: Option<String>,
}

/// What has an id to continue a list after.
pub trait Identified {
    fn id(&self) -> &str;
}

impl<T: Identified> List<T> {
    pub fn new(listing: Listing<impl Into<T>>) -> Self {
        let data: Vec<T> = listing.data.into_iter().map(Into::into).collect();
        let id = |item: Option<&T>| item.map(|item| item.id().to_owned());
        Self { object: "list", has_more: listing.has_more, first_id: id(data.first()), last_id: id(data.last()), data }
    }
}

/// The reply to a deletion.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub struct Deleted {
    pub id: String,
    /// What was deleted, such as `state.deleted`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// Always true.
    pub deleted: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Identified for String {
        fn id(&self) -> &str {
            self
        }
    }

    #[test]
    fn limits_are_checked() {
        assert_eq!(page(None, None).unwrap().limit, 20);
        assert_eq!(page(Some(100), Some("x".into())).unwrap().after.as_deref(), Some("x"));
        for bad in [0, 101] {
            assert!(matches!(page(Some(bad), None), Err(Error::Invalid { param: Some(p), .. }) if p == "limit"));
        }
    }

    #[test]
    fn a_page_names_its_ends() {
        let list: List<String> = List::new(Listing { data: vec!["a", "b", "c"], has_more: true });
        let json = serde_json::to_value(list).unwrap();
        let expected = serde_json::json!({
            "object": "list", "data": ["a", "b", "c"], "has_more": true, "first_id": "a", "last_id": "c"
        });
        assert_eq!(json, expected);
        let empty = serde_json::to_value(List::<String>::new(Listing { data: Vec::<String>::new(), has_more: false }));
        assert!(empty.unwrap()["first_id"].is_null());
    }
}
