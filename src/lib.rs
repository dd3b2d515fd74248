#![doc = include_str!("ARCHITECTURE.md")]

pub mod api;
pub mod app;
pub mod cli;
pub mod config;
pub mod engine;
pub mod model;
pub mod sample;
pub mod scheduler;
pub mod session;
pub mod state;
pub mod telemetry;
pub mod text;
pub mod types;
