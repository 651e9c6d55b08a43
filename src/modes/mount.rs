//! `imz mount`.

use super::{Exit, fail};
use crate::cli::MountArgs;

/// # Errors
/// Always, until the rooms that it wires together are there.
pub fn run(_args: &MountArgs) -> anyhow::Result<()> {
    fail(Exit::Failure, "this build has no mount yet")
}
