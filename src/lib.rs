pub mod model;
pub mod types;
