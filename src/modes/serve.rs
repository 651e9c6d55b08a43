//! `imz serve`.

use super::{Exit, fail};
use crate::cli::ServeArgs;

/// # Errors
/// Always, until the rooms that it wires together are there.
pub fn run(_args: &ServeArgs) -> anyhow::Result<()> {
    fail(Exit::Failure, "this build has no serve yet")
}
