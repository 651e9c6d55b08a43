//! `imz pin`: keep paths whole in the cache, and show how that goes.
//!
//! The mount's process does it; here it is asked, and waited for with a progress bar. Interrupting
//! stops the waiting alone.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::{Exit, fail, place, print};
use crate::cli::keep::PinArgs;
use crate::net::control::keep::{self, PinState};
use crate::replica::pins::to_hex;
use crate::sys;

/// How often it is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// # Errors
/// A path in no mount, at which nothing stands, or that cannot be fetched.
pub fn run(args: &PinArgs) -> anyhow::Result<()> {
    if args.list {
        return list(args);
    }
    for path in &args.paths {
        let name = || path.display().to_string();
        let (place, inside) = place::inside(path)?;
        let hex = to_hex(&inside);
        keep::pin(&place.socket, hex.clone(), args.priority)
            .map_err(place::unanswered)
            .with_context(name)?;
        if !args.no_wait {
            wait(&place.socket, &hex).with_context(name)?;
        }
    }
    Ok(())
}

/// Waits until all of it is here.
fn wait(socket: &Path, hex: &str) -> anyhow::Result<()> {
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes}, {msg}")
        .context("the progress bar")?;
    let bar = ProgressBar::new(0).with_style(style.progress_chars("=> "));
    loop {
        let pins = keep::pins(socket).map_err(place::unanswered)?;
        let Some(pin) = pins.into_iter().find(|pin| pin.path_hex == hex) else {
            return fail(Exit::Failure, "it was unpinned meanwhile");
        };
        bar.set_length(pin.bytes + pin.missing_bytes);
        bar.set_position(pin.bytes);
        bar.set_message(format!("{} objects", pin.objects));
        let given_up = match &pin.state[..] {
            "whole" => {
                bar.finish_and_clear();
                return Ok(());
            }
            "absent" => {
                keep::unpin(socket, hex.to_owned()).map_err(place::unanswered)?;
                Some((Exit::NotFound, "nothing stands there, so nothing is pinned".to_owned()))
            }
            "away" => Some((
                Exit::Unreachable,
                format!(
                    "it is pinned, but the server is away: {} are missing and come when it is back",
                    missing(&pin)
                ),
            )),
            "failed" => {
                let why = pin.error.clone().unwrap_or_default();
                let exit = if why.contains("space") { Exit::NoRoom } else { Exit::Failure };
                let what = format!("it is pinned, but {} are missing: {why}", missing(&pin));
                Some((exit, what))
            }
            _ => None,
        };
        if let Some((exit, what)) = given_up {
            bar.abandon();
            return fail(exit, what);
        }
        std::thread::sleep(ASK_EVERY);
    }
}

fn missing(pin: &PinState) -> String {
    format!("{} files ({})", pin.missing_files, HumanBytes(pin.missing_bytes))
}

fn list(args: &PinArgs) -> anyhow::Result<()> {
    let mounts = match &args.paths[..] {
        [] => sys::mount::ours().context("/proc/self/mountinfo")?,
        paths => paths.to_vec(),
    };
    let mut all = Vec::new();
    for mount in mounts {
        let place = place::find(&mount)?;
        let pins = match keep::pins(&place.socket) {
            Err(e) if args.paths.is_empty() => {
                log::warn!("{}: {e}", place.path.display()); // the others are asked all the same
                continue;
            }
            pins => {
                pins.map_err(place::unanswered).with_context(|| place.path.display().to_string())?
            }
        };
        all.extend(pins.into_iter().map(|pin| (place.path.clone(), pin)));
    }
    if args.json {
        let object = |(mount, pin): &(std::path::PathBuf, PinState)| {
            let mut value = serde_json::to_value(pin)?;
            value["mount"] = mount.to_string_lossy().into();
            Ok(value)
        };
        let values = all.iter().map(object).collect::<Result<Vec<_>, serde_json::Error>>()?;
        return Ok(print(&(serde_json::to_string_pretty(&values)? + "\n"))?);
    }
    let mut text = String::new();
    for (mount, pin) in &all {
        let path = if pin.path == "/" { mount.clone() } else { mount.join(&pin.path) };
        text += &format!("{}\n  {}\n", path.display(), line(pin));
    }
    if text.is_empty() {
        text = "nothing is pinned\n".to_owned();
    }
    Ok(print(&text)?)
}

fn line(pin: &PinState) -> String {
    let state = match &pin.state[..] {
        "whole" => "whole".to_owned(),
        "new" | "fetching" => format!("fetching, {} missing", missing(pin)),
        "away" => format!("the server is away, {} missing", missing(pin)),
        "absent" => "nothing stands there".to_owned(),
        _ => format!("{}, {} missing", pin.error.clone().unwrap_or_default(), missing(pin)),
    };
    let (objects, bytes) = (pin.objects, HumanBytes(pin.bytes));
    format!("priority {}, {objects} objects, {bytes}: {state}", pin.priority)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_how_a_pin_is_doing() {
        let pin = |state: &str| PinState {
            state: state.to_owned(),
            priority: 7,
            objects: 3,
            bytes: 5 << 20,
            missing_files: 2,
            missing_bytes: 1 << 10,
            error: Some("no room".to_owned()),
            ..PinState::default()
        };
        assert_eq!(line(&pin("whole")), "priority 7, 3 objects, 5.00 MiB: whole");
        for (state, part) in [
            ("away", "the server is away, 2 files (1.00 KiB) missing"),
            ("failed", "no room, 2 files (1.00 KiB) missing"),
            ("absent", "nothing stands there"),
            ("new", "fetching, 2 files"),
        ] {
            assert!(line(&pin(state)).contains(part), "{}", line(&pin(state)));
        }
    }
}
