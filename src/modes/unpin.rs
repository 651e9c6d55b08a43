//! `imz unpin`: paths need not be kept whole any more. What is here of them stays for now.

use anyhow::Context;

use super::{Exit, fail, place};
use crate::cli::keep::UnpinArgs;
use crate::net::control::keep;
use crate::replica::pins::to_hex;

/// # Errors
/// A path in no mount, or not pinned itself.
pub fn run(args: &UnpinArgs) -> anyhow::Result<()> {
    for path in &args.paths {
        let name = || path.display().to_string();
        let (place, inside) = place::inside(path)?;
        let was = keep::unpin(&place.socket, to_hex(&inside)).map_err(place::unanswered);
        if !was.with_context(name)? {
            return fail(Exit::NotFound, "it is not pinned (imz pin --list names what is)")
                .with_context(name);
        }
    }
    Ok(())
}
