//! `imz sync`: wait until all that was done in a mount is at the server.

use anyhow::Context;

use super::{Exit, fail, place, ship};
use crate::cli::SyncArgs;

/// # Errors
/// No such mount, the server is away, the time is over.
pub fn run(args: &SyncArgs) -> anyhow::Result<()> {
    let place = place::find(&args.mountpoint)?;
    let name = || place.path.display().to_string();
    if !place.mounted {
        return fail(Exit::NotFound, "it is served, not mounted: there is nothing to wait for")
            .with_context(name);
    }
    ship::wait(&place.socket, args.timeout).with_context(name)
}
