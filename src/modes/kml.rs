use super::{Exit, fail};
use crate::cli::DumpArgs;

pub fn run(_args: &DumpArgs) -> anyhow::Result<()> {
    fail(Exit::Failure, "not yet")
}
