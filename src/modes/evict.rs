//! `imz evict`: data leave the cache, stubs stay.
//!
//! The mount's process does it and refuses what may not go; here its refusals are named.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::{Exit, fail, place, print};
use crate::cli::keep::EvictArgs;
use crate::net::control;
use crate::net::control::keep::{self, Evicted};
use crate::replica::pins::to_hex;

/// How often it is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// # Errors
/// A path in no mount, or one that names a file that may not go.
pub fn run(args: &EvictArgs) -> anyhow::Result<()> {
    let mut kept = 0;
    for path in &args.paths {
        let name = || path.display().to_string();
        let (place, inside) = place::inside(path)?;
        if args.all && !inside.is_empty() {
            let what = "it is not a mount point; --all is for whole mounts";
            return fail(Exit::NotFound, what).with_context(name);
        }
        let done = wait(&place.socket, to_hex(&inside)).with_context(name)?;
        print(&said(&done, args.all))?;
        if control::status(&place.socket).is_ok_and(|status| !status.connected) {
            log::warn!("{}: the server is away: what went cannot be read until it is back", name());
        }
        kept += if args.all { 0 } else { done.kept };
    }
    match kept {
        0 => Ok(()),
        n => fail(Exit::Refused, format!("{n} files keep their data")),
    }
}

fn wait(socket: &Path, hex: String) -> anyhow::Result<Evicted> {
    let number = keep::evict(socket, hex).map_err(place::unanswered)?;
    let style = ProgressStyle::with_template("{spinner} {msg}").context("the progress bar")?;
    let bar = ProgressBar::new_spinner().with_style(style);
    loop {
        let so_far = keep::evicted(socket, number).map_err(place::unanswered)?;
        if so_far.done {
            bar.finish_and_clear();
            return Ok(so_far);
        }
        bar.set_message(format!("{} files, {}", so_far.files, HumanBytes(so_far.bytes)));
        bar.tick();
        std::thread::sleep(ASK_EVERY);
    }
}

/// What went, and what stays and why. `all`: what stays is no more than counted.
fn said(done: &Evicted, all: bool) -> String {
    let mut text = format!("{} files gave {}\n", done.files, HumanBytes(done.bytes));
    if all && done.kept > 0 {
        text += &format!("{} files keep their data\n", done.kept);
    } else {
        for (path, why) in &done.named {
            text += &format!("{path}: {why}\n");
        }
        if done.kept > done.named.len() as u64 {
            text += &format!("and {} files more\n", done.kept - done.named.len() as u64);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_named_or_counted() {
        let named = vec![("a/b".to_owned(), "it is open".to_owned())];
        let done = Evicted { done: true, files: 2, bytes: 1 << 20, kept: 3, named };
        let want = "2 files gave 1.00 MiB\na/b: it is open\nand 2 files more\n";
        assert_eq!(said(&done, false), want);
        assert_eq!(said(&done, true), "2 files gave 1.00 MiB\n3 files keep their data\n");
    }
}
