//! What `object_store` can't do: create a bucket and look at its settings.

use aws_sdk_s3::config::{BehaviorVersion, Builder, Credentials, Region};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::create_bucket::CreateBucketError;
use aws_sdk_s3::types::{
    BucketLocationConstraint, BucketVersioningStatus, CreateBucketConfiguration,
};
use aws_sdk_s3::{Client, Config};

use crate::environment::{self, variable};
use crate::error::{BlobError, chain};

/// Settings of a bucket that matter to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketSettings {
    /// Overwritten and deleted objects stay as old versions, and are paid for.
    pub versioned: bool,
}

fn unusable<E>(bucket: &str, error: &SdkError<E>) -> BlobError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let cause = match (error.message(), error.code()) {
        (Some(message), Some(code)) => format!("{message} ({code})"),
        (Some(message), None) => message.to_owned(),
        (None, _) => chain(error),
    };
    BlobError::Unusable { store: format!("s3://{bucket}"), cause: cause.replace('\n', " ") }
}

fn client(bucket: &str, endpoint: Option<&str>) -> Result<(Client, String), BlobError> {
    let refused = |cause| BlobError::Unusable { store: format!("s3://{bucket}"), cause };
    environment::check(endpoint).map_err(refused)?;
    let missing = |name: &str| refused(format!("{name} is not set"));
    let key = variable("AWS_ACCESS_KEY_ID").ok_or_else(|| missing("AWS_ACCESS_KEY_ID"))?;
    let secret =
        variable("AWS_SECRET_ACCESS_KEY").ok_or_else(|| missing("AWS_SECRET_ACCESS_KEY"))?;
    let region = variable("AWS_REGION")
        .or_else(|| variable("AWS_DEFAULT_REGION"))
        .unwrap_or_else(|| "us-east-1".into());
    let credentials =
        Credentials::new(key, secret, variable("AWS_SESSION_TOKEN"), None, "environment");
    let mut config: Builder = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(region.clone()))
        .credentials_provider(credentials);
    if let Some(endpoint) = endpoint {
        config = config.endpoint_url(endpoint).force_path_style(true);
    }
    Ok((Client::from_conf(config.build()), region))
}

/// Creates the bucket; success if we own it already.
pub async fn create_bucket(bucket: &str, endpoint: Option<&str>) -> Result<(), BlobError> {
    let (client, region) = client(bucket, endpoint)?;
    let mut request = client.create_bucket().bucket(bucket);
    // us-east-1 is the one region that must not be named.
    if region != "us-east-1" {
        let constraint = BucketLocationConstraint::from(region.as_str());
        request = request.create_bucket_configuration(
            CreateBucketConfiguration::builder().location_constraint(constraint).build(),
        );
    }
    match request.send().await {
        Ok(_) => Ok(()),
        Err(SdkError::ServiceError(error))
            if matches!(error.err(), CreateBucketError::BucketAlreadyOwnedByYou(_)) =>
        {
            Ok(())
        }
        Err(error) => Err(unusable(bucket, &error)),
    }
}

/// Reads the bucket's settings; an error says that the bucket is missing or unreachable.
pub async fn bucket_settings(
    bucket: &str,
    endpoint: Option<&str>,
) -> Result<BucketSettings, BlobError> {
    let (client, _) = client(bucket, endpoint)?;
    let versioning = client
        .get_bucket_versioning()
        .bucket(bucket)
        .send()
        .await
        .map_err(|error| unusable(bucket, &error))?;
    Ok(BucketSettings { versioned: versioning.status() == Some(&BucketVersioningStatus::Enabled) })
}
