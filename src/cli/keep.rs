//! The command lines of `imz pin`, `unpin` and `evict`: definitions, and nothing else.

use std::path::PathBuf;

use clap::Args;

/// Keep files and directories whole in the cache
///
/// Fetches what is missing at each PATH and below it, with a progress bar, and keeps it: pinned data
/// are never evicted, and what appears there at the server later is fetched in the background, at no
/// more than 16 MiB and 500 questions a second. A pin is of a path, not of a file: what stands there
/// is kept, also when a program puts a new file in the place of the old one. Pins are part of the
/// cache and survive restarts.
///
/// Interrupting the command stops the waiting, not the fetching. The mount itself is not touched:
/// its process is asked.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Keys of --list --json, an array with an object for each pin:
  mount, path                      where it is
  path_hex                         the path in the volume, byte by byte
  priority                         higher ones are fetched first
  state, error                     new, fetching, whole, away (the server is), absent (nothing
                                   stands there), failed (and why)
  objects, bytes                   what stands there, and data of it that are here
  missing_files, missing_bytes     what is still to be fetched

Examples:
  Have a project with you on the train:
      imz pin /mnt/projects/plan
  What is pinned, and is it all here?
      imz pin --list

The exit code is 3 when the server is away: what is missing comes when it is back. See imz(1) for the
others.")]
pub struct PinArgs {
    /// Files or directories in a mount; with --list mount points
    #[arg(value_name = "PATH", required_unless_present = "list")]
    pub paths: Vec<PathBuf>,
    /// What is fetched first: 0 to 100, higher ones before lower ones
    #[arg(long, value_name = "N", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=100))]
    pub priority: u8,
    /// Do not wait until all of it is here
    #[arg(long, conflicts_with = "list")]
    pub no_wait: bool,
    /// Show what is pinned, and whether it is all here
    #[arg(long)]
    pub list: bool,
    /// The list as JSON
    #[arg(long, requires = "list")]
    pub json: bool,
}

/// Keep them no longer
///
/// What is in the cache of it stays, until other data need the room (see cache-max in imz-mount(1)) or
/// imz evict is told to.
#[derive(Args, Debug)]
#[command(after_long_help = "See imz(1) for the exit codes; 5 says that it was not pinned.")]
pub struct UnpinArgs {
    /// Paths as they were pinned
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
}

/// Make room: give up data that the server has
///
/// Files at each PATH and below it become stubs: names, sizes and attributes stay, data are fetched
/// again when they are read. A file is refused, by name and with the reason, when the server does not
/// have all of it yet, when it is open, mapped or run by a process, when it is pinned, or while it is
/// being fetched. The exit code is 4 then, and what could go has gone.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  Give up what is large and done with:
      imz evict /mnt/projects/videos
  Everything that may go:
      imz evict --all /mnt/projects

See imz(1) for the exit codes.")]
pub struct EvictArgs {
    /// Files or directories in a mount; with --all mount points
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// All that may go of a whole mount; what may not is counted, and no failure
    #[arg(long)]
    pub all: bool,
}
