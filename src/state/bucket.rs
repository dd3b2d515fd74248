//! A store in a bucket of S3, of anything that speaks its language, or of Google's or Microsoft's clouds.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::TryStreamExt;
use object_store::path::Path as Location;
use object_store::{
    Attribute, Attributes, BackoffConfig, GetOptions, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    RetryConfig,
};

use super::store::{check, is_name};
use super::{Error, Put, Start, Store};
use crate::telemetry::clock;

/// Objects under a prefix of a bucket, which any number of servers share.
///
/// Putting is one request with `If-None-Match: *` (or what that cloud has for it): the bucket decides who was first. Two
/// things are told by that answer alone to look like losing, and are not: a request that is sent again because its first
/// answer was lost finds what it wrote itself, and a bucket under load refuses two puts at once. So each put carries a random
/// mark, and whoever is refused looks whose mark is there.
pub struct Bucket {
    objects: Arc<dyn ObjectStore>,
    prefix: String,
}

/// Where a bucket is. Credentials come from the environment, under the names that each cloud's tools have for them.
#[derive(Clone, Debug, Default)]
pub struct BucketUrl {
    /// `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
    pub url: String,
    /// Address of a server that speaks S3's language; empty = AWS.
    pub endpoint: String,
}

/// The mark of a put, in the object's metadata.
const MARK: &str = "rewake-put";

/// How often a put that was refused, though nothing is there, is tried again.
const TRIES: usize = 5;

/// A turn waits for the bucket; it should hear of a failure while its client still listens.
const RETRY: Duration = Duration::from_secs(20);

impl Bucket {
    /// Opens the bucket and makes sure that it can be written and that it keeps its promise about puts.
    ///
    /// # Errors
    /// [`Error::Open`] says what is wrong with the address, the credentials or the bucket.
    pub async fn open(place: &BucketUrl) -> Result<Self, Error> {
        let failed = |cause: String| Error::Open { folder: place.url.clone(), cause };
        // Only the first call counts; the client cannot be built without one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (scheme, rest) =
            place.url.split_once("://").ok_or_else(|| failed("it is no address of a bucket".into()))?;
        let prefix = rest.split_once('/').map_or("", |(_, prefix)| prefix).trim_matches('/');
        if !prefix.is_empty() && !prefix.split('/').all(is_name) {
            return Err(failed("its prefix must be names of A-Z, a-z, 0-9, _, ., : and -, joined by /".into()));
        }
        let retry = RetryConfig { max_retries: 8, retry_timeout: RETRY, backoff: BackoffConfig::default() };
        let url = place.url.clone();
        if !place.endpoint.is_empty() && scheme != "s3" {
            return Err(failed("only s3:// has an endpoint of its own".into()));
        }
        let objects: object_store::Result<Arc<dyn ObjectStore>> = match scheme {
            "s3" => {
                let mut s3 = object_store::aws::AmazonS3Builder::from_env().with_url(url).with_retry(retry);
                if !place.endpoint.is_empty() {
                    s3 = s3.with_endpoint(&place.endpoint).with_allow_http(place.endpoint.starts_with("http://"));
                }
                s3.build().map(|store| Arc::new(store) as _)
            }
            "gs" => object_store::gcp::GoogleCloudStorageBuilder::from_env()
                .with_url(url)
                .with_retry(retry)
                .build()
                .map(|store| Arc::new(store) as _),
            "az" => object_store::azure::MicrosoftAzureBuilder::from_env()
                .with_url(url)
                .with_retry(retry)
                .build()
                .map(|store| Arc::new(store) as _),
            other => return Err(failed(format!("`{other}` is none of s3, gs and az"))),
        };
        let bucket = Self { objects: objects.map_err(|e| failed(e.to_string()))?, prefix: prefix.into() };
        match bucket.probe().await {
            Ok(true) => Ok(bucket),
            Ok(false) => Err(failed(
                "it lets an object be written over though it was asked not to (If-None-Match), so two servers could both \
                 commit a turn"
                    .into(),
            )),
            Err(Error::Store { cause, .. }) => Err(failed(cause)),
            Err(other) => Err(failed(other.to_string())),
        }
    }

    /// A bucket over any implementation that can put if absent.
    pub fn over(objects: Arc<dyn ObjectStore>, prefix: &str) -> Self {
        Self { objects, prefix: prefix.into() }
    }

    /// Whether the bucket can be written and an object that is there stays as it is.
    pub async fn probe(&self) -> Result<bool, Error> {
        let key = format!("probe/{:032x}", clock::random_u128());
        let first = self.put_if_absent(&key, Bytes::from_static(b"can this bucket be written?\n")).await?;
        let second = self.put_if_absent(&key, Bytes::from_static(b"can it be written over?\n")).await?;
        self.delete(&key).await?;
        Ok((first, second) == (Put::Created, Put::Exists))
    }

    fn locate(&self, key: &str) -> Result<Location, Error> {
        check(key)?;
        Ok(if self.prefix.is_empty() { Location::from(key) } else { Location::from(format!("{}/{key}", self.prefix)) })
    }

    async fn find(&self, key: &str, options: GetOptions) -> Result<Option<GetResult>, Error> {
        match self.objects.get_opts(&self.locate(key)?, options).await {
            Ok(found) => Ok(Some(found)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(failed("read", key)(e)),
        }
    }

    /// What is known of an object without reading it.
    async fn look(&self, key: &str) -> Result<Option<GetResult>, Error> {
        self.find(key, GetOptions::default().with_head(true)).await
    }

    /// The names of objects in `folder` after `after`, or `None` if these are not all that there may be below it.
    ///
    /// Listings go by whole keys. As long as names have no sign before `/`, and none is a folder, that is the order of names.
    async fn objects_in(&self, folder: &str, after: Option<&str>, limit: usize) -> Result<Option<Vec<String>>, Error> {
        let prefix = self.locate(folder)?;
        let plain = |name: &str| name.bytes().all(|b| b > b'/');
        let mut listed = match after {
            Some(after) if !plain(after) => return Ok(None),
            Some(after) => self.objects.list_with_offset(Some(&prefix), &prefix.clone().join(after)),
            None => self.objects.list(Some(&prefix)),
        };
        let mut names = Vec::new();
        while names.len() < limit {
            let Some(object) = listed.try_next().await.map_err(failed("list", folder))? else { break };
            let mut parts = object.location.prefix_match(&prefix).into_iter().flatten();
            match (parts.next(), parts.next()) {
                (Some(name), None) if plain(name.as_ref()) => names.push(name.as_ref().to_owned()),
                _ => return Ok(None),
            }
        }
        // Not every implementation promises an order.
        Ok(names.is_sorted().then_some(names))
    }
}

impl Store for Bucket {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        async move {
            let location = self.locate(key)?;
            let mark = format!("{:032x}", clock::random_u128());
            for _ in 0..TRIES {
                let attributes = Attributes::from_iter([(Attribute::Metadata(MARK.into()), mark.clone())]);
                let options = PutOptions { mode: PutMode::Create, attributes, ..PutOptions::default() };
                match self.objects.put_opts(&location, value.clone().into(), options).await {
                    Ok(_) => return Ok(Put::Created),
                    Err(object_store::Error::AlreadyExists { .. }) => {}
                    Err(e) => return Err(failed("write", key)(e)),
                }
                if let Some(there) = self.look(key).await? {
                    let mine = there.attributes.get(&Attribute::Metadata(MARK.into())).is_some_and(|m| **m == *mark);
                    return Ok(if mine { Put::Created } else { Put::Exists });
                }
            }
            let cause = "the bucket refuses to write it, and it is not there".into();
            Err(Error::Store { doing: "write", key: key.into(), cause, fault: None })
        }
        .boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        async move {
            let Some(found) = self.find(key, GetOptions::default()).await? else { return Ok(None) };
            Ok(Some(found.bytes().await.map_err(failed("read", key))?))
        }
        .boxed()
    }

    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        async move {
            // A range of nothing is an error.
            if len == 0 {
                return Ok(self.look(key).await?.map(|there| Start { bytes: Bytes::new(), size: there.meta.size }));
            }
            let found = match self.find(key, GetOptions::default().with_range(Some(0..len as u64))).await {
                Ok(found) => found,
                // And so is one of an empty object.
                Err(e) => match self.look(key).await? {
                    Some(there) if there.meta.size == 0 => return Ok(Some(Start { bytes: Bytes::new(), size: 0 })),
                    _ => return Err(e),
                },
            };
            let Some(found) = found else { return Ok(None) };
            let size = found.meta.size;
            Ok(Some(Start { bytes: found.bytes().await.map_err(failed("read", key))?, size }))
        }
        .boxed()
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
        async move {
            // Deleting what is not there is no error to a bucket.
            if self.look(key).await?.is_none() {
                return Ok(false);
            }
            match self.objects.delete(&self.locate(key)?).await {
                Ok(()) => Ok(true),
                Err(object_store::Error::NotFound { .. }) => Ok(false),
                Err(e) => Err(failed("delete", key)(e)),
            }
        }
        .boxed()
    }

    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
        async move {
            if limit == 0 {
                return self.locate(folder).map(|_| Vec::new());
            }
            if let Some(names) = self.objects_in(folder, after, limit).await? {
                return Ok(names);
            }
            let prefix = self.locate(folder)?;
            let listed = self.objects.list_with_delimiter(Some(&prefix)).await.map_err(failed("list", folder))?;
            let objects = listed.objects.iter().map(|object| &object.location);
            // Locations write `.` and `..` so.
            let name = |at: &Location| Some(at.filename()?.replace("%2E", "."));
            let names: BTreeSet<String> = objects.chain(&listed.common_prefixes).filter_map(name).collect();
            let wanted = |name: &String| is_name(name) && after.is_none_or(|after| name.as_str() > after);
            Ok(names.into_iter().filter(wanted).take(limit).collect())
        }
        .boxed()
    }
}

fn failed<E: std::error::Error>(doing: &'static str, key: &str) -> impl FnOnce(E) -> Error {
    move |e| Error::Store { doing, key: key.into(), cause: e.to_string(), fault: None }
}
