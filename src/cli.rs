//! The command line: clap definitions, and nothing else.
//!
//! The doc comments here are the documentation of the commands: `--help`, man/ and completions/
//! are made from them, and tests/cli.rs holds those files to this one. The values with a grammar
//! of their own (SOURCE, `-o`, durations) are in [`options`].
//!
//! Absent on purpose: any look at the file system, the network or the clock. What can be said
//! about an argument from its text alone is said here, with exit code 2; all else is the modes'.
//!
//! Source: ripgrep and fd, whose help, man pages and completions are one text.

pub mod check;
pub mod conflicts;
pub mod keep;
pub mod options;
pub mod replay;
pub mod volume;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgAction, Args, Parser, Subcommand};

use check::{FsckArgs, InspectArgs};
use conflicts::ConflictsArgs;
use keep::{EvictArgs, PinArgs, UnpinArgs};
use options::{Export, MountOption, MountOptions, Point, Source};
use replay::ReplayArgs;
use volume::VolumeArgs;

/// The exit codes, as the help and the man pages give them; src/modes/mod.rs maps to them.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  success
  1  failure that has no code of its own
  2  usage: an argument is missing, unknown or malformed
  3  the server cannot be reached
  4  refused: in use, busy, or a cache that belongs to another volume
  5  not found: the volume, the mount or the directory
  6  data is damaged: a journal does not verify
  7  no room, or a file system that cannot carry imz (no extended attributes)";

/// A distributed file system at local-disk speed
///
/// imz serves a directory of ordinary files (imz serve) and mounts it on other machines (imz
/// mount) over a local cache, which is a directory of ordinary files too. Every operation runs on
/// the local disk first, is written to a journal, and is shipped to the server in the background:
/// work goes at local speed, goes on while the server is away, and what was done meanwhile is
/// shipped when it is back.
///
/// The environment variables XDG_RUNTIME_DIR (control sockets) and XDG_STATE_HOME (caches) are
/// honoured for users other than root.
#[derive(Parser, Debug)]
#[command(name = "imz", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_long_help = EXIT_CODES)]
pub struct Cli {
    /// Say more on standard error; twice for debugging, three times for a trace
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    Serve(ServeArgs),
    Mount(MountArgs),
    Umount(UmountArgs),
    Sync(SyncArgs),
    Status(StatusArgs),
    Pin(PinArgs),
    Unpin(UnpinArgs),
    Evict(EvictArgs),
    Conflicts(ConflictsArgs),
    Kml(KmlArgs),
    Inspect(InspectArgs),
    Fsck(FsckArgs),
    Volume(VolumeArgs),
    Replay(ReplayArgs),
}

impl Command {
    /// The word that was typed, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Serve(_) => "serve",
            Command::Mount(_) => "mount",
            Command::Umount(_) => "umount",
            Command::Sync(_) => "sync",
            Command::Status(_) => "status",
            Command::Pin(_) => "pin",
            Command::Unpin(_) => "unpin",
            Command::Evict(_) => "evict",
            Command::Conflicts(_) => "conflicts",
            Command::Kml(_) => "kml",
            Command::Inspect(_) => "inspect",
            Command::Fsck(_) => "fsck",
            Command::Volume(_) => "volume",
            Command::Replay(_) => "replay",
        }
    }
}

/// Serve directories to clients
///
/// Serves each directory as a volume, as it is and at once: there is no import and no scan. Stays
/// in the foreground, says when it is ready (to systemd as well, by sd_notify), and ends on SIGTERM
/// or SIGINT with everything that it acknowledged on disk.
///
/// The directory's file system must carry extended attributes. The files stay ordinary files: take
/// imz away, and they are all still there.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  Serve one directory on this machine's port 7070:
      imz serve /srv/projects
  Serve two volumes, with their state on another disk:
      imz serve src=/srv/src doc=/srv/doc --state /var/lib/imz-server
  Serve what a file says, after a look at it:
      imz serve --check-config /etc/imz.toml && imz serve --config /etc/imz.toml
  Use it from another machine, through ssh:
      ssh -N -L 7070:127.0.0.1:7070 fileserver &
      imz mount localhost:/projects /mnt/projects

Configuration file (TOML):
  # Where clients come in; as --listen, which wins over it. The default:
  listen = \"127.0.0.1:7070\"
  # Where imz keeps its own state: each volume in a directory of its name below this one.
  # Without it .imz in the served directory. As --state, which wins over it.
  state = \"/var/lib/imz-server\"
  # How long a client that is away keeps the room that it was granted; as --keep-grant, which wins
  # over it. The default:
  keep_grant = \"7d\"

  [[volume]]                  # one for each volume; none is fine, imz volume create adds them
  name = \"photos\"             # what clients call it: HOST:/photos
  dir = \"/srv/photos\"         # the whole path of an existing directory
  quota = \"200G\"              # all of its files together; without it the disk is the limit
  quota_files = 1000000       # how many files, directories and links
  mode = \"rw\"                 # or \"ro\": clients may read it and not change it
  # state = \"/fast/photos\"    # its state alone, whatever it is called

  [volume.user_quota]         # of the volume above: what a user's files may hold, by user id
                              # (kept and shown; this version does not enforce it)
  1000 = \"20G\"

  The file is the truth for all that it can say: a volume without quota has none, whatever it had
  before. imz volume changes the running server and this file, and leaves its comments alone.
  Unknown keys are errors.

See imz(1) for the exit codes.")]
pub struct ServeArgs {
    /// The directories to serve, each as DIR or NAME=DIR
    ///
    /// A plain DIR becomes a volume named after the directory's last component. When there is just
    /// one volume, clients may leave its name out (HOST:/). A directory with an equals sign in its
    /// name is written with a slash before it: ./a=b.
    #[arg(required_unless_present_any = ["config", "check_config"], value_name = "[NAME=]DIR")]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| Export::parse(&text)))]
    pub exports: Vec<Export>,
    /// The address and port to listen on
    ///
    /// Loopback only: this version has no keys yet, so whoever reaches the port may read and write
    /// everything. Reach it from other machines through ssh -L. IPv6 addresses stand in brackets.
    /// Port 0 takes a free one and says which. By default 127.0.0.1:7070.
    #[arg(long, value_name = "ADDR:PORT")]
    #[arg(value_parser = options::listen)]
    pub listen: Option<SocketAddr>,
    /// Where imz keeps its own state of the volume: journal, index, lock
    ///
    /// By default .imz in the served directory, which clients do not see. With several volumes each
    /// has a directory of its name below DIR.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Read what to serve, and how, from a file; see below
    #[arg(long, value_name = "FILE", conflicts_with = "exports")]
    pub config: Option<PathBuf>,
    /// Say every error in such a file, by its line, and serve nothing
    ///
    /// The exit code is 0 when there is none, and 2 otherwise.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["exports", "config", "listen", "state"])]
    pub check_config: Option<PathBuf>,
    /// How long the room that a client was granted is kept for it while it is away
    ///
    /// Each client is granted room before it writes, so that what it wrote finds its place here. A
    /// client that is away may write that much. One that stays away for longer loses what it has
    /// not used, and stops writing about then by itself. See imz-space(7). By default 7d.
    #[arg(long, value_name = "DURATION", value_parser = options::duration)]
    pub keep_grant: Option<Duration>,
}

/// Mount a volume, or put a write-back cache before a directory
///
/// Returns when the mount is usable, and goes on in the background. Everything that is done in the
/// mount is done in the local cache and written to the journal first, and shipped to the server
/// soon after. While the server is away, what is in the cache can be read and written; it is
/// shipped when the server is back. SIGTERM, umount(8) and a crash lose nothing: the next mount of
/// the same cache goes on shipping. imz umount ships first.
///
/// Needs /dev/fuse, and fusermount3 when not run as root. As root, reads and writes of cached files
/// do not pass through the daemon at all.
///
/// With a link named mount.imz in /sbin that leads to imz, mount(8) and fstab(5) know the file
/// system type imz.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = "\
Mount options:
  ro, rw             read-only or not (default rw)
  sync, async        fsync waits for the server, too (default async: for the local disk)
  allow_other        let other users in; root's mounts always do, for others /etc/fuse.conf must
                     say user_allow_other
  cache=DIR          as --cache
  age=DURATION       how long a change ages before it is shipped, so that short-lived files stay
                     here (default 2s; 0 ships at once)
  cache-max=SIZE     how much data the cache may hold; what the server has gives way, the least
                     recently used first (default: no limit)
  timeout=DURATION   how long the server may be silent before it counts as away (default 10s)
  offline=error      what is not in the cache fails with EHOSTUNREACH while the server is away
                     (default)
  offline=wait       it waits until the server is back; who waits can be interrupted and killed
  passthrough=auto   data of cached files goes past the daemon where the kernel allows it (default)
  passthrough=off    all data goes through the daemon
  coherence=close-to-open
                     who opens a file sees what was closed, synced or unlocked before (default)
  coherence=strict   every read sees every write that has returned, also in files that are open;
                     data goes through the daemon, and no file can be mapped shared
  coherence=session  for a machine that mostly has the volume to itself: it keeps its permits for
                     as long as nobody else needs them, however long it rests
  uring=auto         requests come over io_uring where the kernel allows it and root mounts
                     (default): Linux 6.14 and newer, and only after
                     echo Y > /sys/module/fuse/parameters/enable_uring
  uring=on           the same, or the mount fails
  uring=off          requests come by /dev/fuse
  reserve=on         room at the server is set aside before anything is written (default);
                     see imz-space(7)
  reserve=exact      the same, and every write is counted before it is done, however much room
                     there is: no file is written past the daemon
  reserve=off        nothing is reserved: for benchmarks
  offline-space=granted
                     while the server is away, no more is written than was granted (default)
  offline-space=optimistic
                     more is written, in the hope that there will be room for it
  suid, nosuid, dev, nodev, exec, noexec, atime, noatime
                     as in mount(8)
  defaults, auto, noauto, user, users, nofail, _netdev, relatime, x-* and the like
                     accepted, and left to mount(8)

Durations are numbers with a unit: 500ms, 2s, 1min, 1h; a plain number is seconds. Sizes are
numbers with K, M, G or T for powers of 1024; a plain number is bytes.

The server away:
  A mount whose cache knows its volume comes up without the server, within 3 s, and says so; so
  it does when the name of the server cannot be resolved. It is known that the server is away

      at once, when the network has no way to it, or its name cannot be resolved
      after 3 s (or timeout=, if that is shorter), when it has closed the connection or refuses it
      when it was silent for 8 s (or four fifths of timeout=)

  and from then on nobody waits for it. Until then who needs it waits, since it may only be
  starting again. While it is away

      what is cached      can be read, listed and changed in full; changes are journaled
      a stub              (a file that was listed, not read) has its name and attributes; to
                          open or read it fails, and so does a range of a large file that is
                          not here. It can be removed, renamed, truncated to nothing, chmoded
      a directory that was never listed
                          fails to be listed, and so does a look for a name in it; what is made
                          there is made, unless the name has to be looked up first
      a name that a listed directory does not have
                          does not exist (ENOENT), as it was when it was listed
      flock and fcntl     lock among the processes of this machine
      df                  gives what the server said last

  To fail is EHOSTUNREACH (No route to host), or with offline=wait the process waits. fsync with
  -o sync fails with it after timeout=, in both cases. The client tries to connect again after
  0.1 s, then twice as long each time up to 10 s, by chance between half and the whole of that;
  imz sync and imz umount try at once. A machine that was suspended knows at its return how long
  it slept: what it may do without asking ends in time.

The limit of the cache:
  cache-max= counts all data in the cache. Over it files give up their data and become stubs,
  until a tenth of it is free: first those that nobody opened or fetched since this mount was made,
  then the others, the least recently opened or fetched first (of the last 65,536). Never files
  that the server does not have in full, that are open or mapped, or pinned, and nothing that
  was used in the last 2 s. While the server is away nothing is evicted, for it could not be fetched
  again. When what must stay is more than the limit, imz status says so.

Examples:
  Mount a volume of a server:
      imz mount fileserver:/projects /mnt/projects
  A fast local cache before a slow disk, in one process:
      imz mount ./some/dir /some/mountpoint
  A line of /etc/fstab:
      localhost:7070:/projects  /mnt/projects  imz  allow_other,noauto,_netdev  0  0

See imz(1) for the exit codes.")]
pub struct MountArgs {
    /// What to mount: HOST[:PORT]:/VOLUME, or a directory
    ///
    /// HOST is a name, an IPv4 address, or an IPv6 address in brackets; PORT is 7070 if not given;
    /// HOST:/ is the server's only volume. Anything else is a directory on this machine, which this
    /// same process then serves to this mount alone. A directory with a colon in its name is
    /// written with a slash before it: ./a:b.
    #[arg(value_name = "SOURCE")]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| Source::parse(&text)))]
    pub source: Source,
    /// An existing directory, over which the volume appears
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: PathBuf,
    /// Mount options, separated by commas; see below
    #[arg(short = 'o', value_name = "OPT[=VALUE],...", value_delimiter = ',')]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| MountOption::parse(&text)))]
    pub options: Vec<MountOption>,
    /// Where the cache is: the files, and the journal of what is not yet at the server
    ///
    /// Never delete it while imz status says that records are pending. By default a directory
    /// named after SOURCE in /var/lib/imz (root), or in $XDG_STATE_HOME/imz or ~/.local/state/imz.
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Stay in the foreground, with messages on standard error
    #[arg(short, long)]
    pub foreground: bool,
}

impl MountArgs {
    /// All of `-o` and `--cache` together. The later of two options that contradict each other
    /// wins; `--cache` wins over `-o cache=`.
    pub fn settings(&self) -> MountOptions {
        let mut settings = MountOptions::collect(&self.options);
        if self.cache.is_some() {
            settings.cache.clone_from(&self.cache);
        }
        settings
    }
}

/// How mount(8) calls us when we are named mount.imz; `-f` and `-s` have its meanings here.
#[derive(Parser, Debug)]
#[command(name = "mount.imz", version)]
pub struct MountHelper {
    #[arg(value_name = "SOURCE")]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| Source::parse(&text)))]
    pub source: Source,
    #[arg(value_name = "DIR")]
    pub mountpoint: PathBuf,
    /// Options, separated by commas
    #[arg(short = 'o', value_name = "OPTS", value_delimiter = ',')]
    pub options: Vec<OsString>,
    /// Pretend: check the arguments, mount nothing
    #[arg(short)]
    pub fake: bool,
    /// Let unknown options pass
    #[arg(short)]
    pub sloppy: bool,
    /// No entry in mtab: there is none anyway
    #[arg(short)]
    pub no_mtab: bool,
    #[arg(short, action = ArgAction::Count)]
    pub verbose: u8,
    /// Type and subtype; always ours
    #[arg(short, value_name = "TYPE")]
    pub type_name: Option<OsString>,
}

impl MountHelper {
    /// The same as `imz mount` has it.
    ///
    /// # Errors
    /// An option that nobody knows, unless `-s` was given.
    pub fn into_args(self) -> Result<MountArgs, options::BadValue> {
        let parsed = self.options.iter().map(|text| MountOption::parse(text));
        let options = if self.sloppy {
            parsed.filter_map(Result::ok).collect()
        } else {
            parsed.collect::<Result<Vec<_>, _>>()?
        };
        let (source, mountpoint) = (self.source, self.mountpoint);
        Ok(MountArgs { source, mountpoint, options, cache: None, foreground: false })
    }
}

/// Ship what is pending, then unmount
///
/// Waits, with a progress bar on a terminal, until the server has acknowledged everything that was
/// done in the mount so far; then unmounts, and returns when the mount's process has ended. When
/// the server is away, nothing is unmounted and the exit code is 3. A mount whose process has died
/// is cleaned up; what its cache holds is shipped by the next mount of it.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  Unmount with everything at the server:
      imz umount /mnt/projects
  The server is away, and the laptop must go:
      imz umount --now /mnt/projects

See imz(1) for the exit codes.")]
pub struct UmountArgs {
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: PathBuf,
    /// Give up if not all is shipped by then, and leave the mount as it is
    ///
    /// Without it imz waits as long as the server can be reached, and gives up as soon as it is known
    /// to be away (see imz-mount(1)). Durations are 500ms, 2s, 1min; a plain number is seconds.
    #[arg(long, value_name = "DURATION", value_parser = options::duration)]
    pub timeout: Option<Duration>,
    /// Do not wait for the server: the cache keeps what is pending, and its next mount ships it
    #[arg(long, conflicts_with = "timeout")]
    pub now: bool,
}

/// Wait until all that was done in a mount is at the server
///
/// Returns when the server has acknowledged, durably, every change that was made in the mount
/// before the command was given. Shows a progress bar on a terminal. Interrupting it stops the
/// waiting, not the shipping.
#[derive(Args, Debug)]
#[command(after_long_help = "See imz(1) for the exit codes; 3 says that the server is away.")]
pub struct SyncArgs {
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: PathBuf,
    /// Give up if not all is shipped by then
    ///
    /// Without it imz waits as long as the server can be reached, and gives up as soon as it is known
    /// to be away (see imz-mount(1)). Durations are 500ms, 2s, 1min; a plain number is seconds.
    #[arg(long, value_name = "DURATION", value_parser = options::duration)]
    pub timeout: Option<Duration>,
}

/// Say how mounts are doing: connection, pending changes, cache
///
/// Asks the process behind the mount over its control socket, and never touches the mount itself,
/// so it answers within 2 s even if the mount hangs. Without MOUNTPOINT it lists every mount and
/// served directory of this user; of a served directory it names the clients.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Keys of --json:
  mount, server, volume            where it is mounted, and what
  connected, since                 whether the server is there, and from when on (RFC 3339)
  since_seconds                    how long ago that was, whatever the time of day was set to
  away                             it is known that the server is away: nobody waits for it
  pending_records, pending_bytes   what the server has not acknowledged yet
  oldest_pending_seconds           age of the oldest such record
  rate_bytes_per_second            speed of shipping, lately
  cache, cache_clean_bytes, cache_dirty_bytes
                                   the cache directory; data that could be fetched again, and
                                   data that is nowhere else
  cache_max_bytes                  the limit of both together; 0 is none
  evicted_bytes                    data that gave way, or were evicted by hand, so far
  pins, pinned_objects, pinned_bytes, pinned_missing_files
                                   paths that are kept whole, what stands there, and how many files
                                   of it are not here in full
  conflicts                        versions kept aside in the volume, waiting for a decision, as
                                   the server last said; imz conflicts lists them
  saved_records, saved_bytes       changes, and bytes of contents, that needed not be shipped since
                                   the start because later changes made them void
  journal_bytes                    size of the journal on disk
  requests_foreground              requests to the server that an operation waited for, so far
  messages                         sent and received so far, but for pings
  permit                           what may be done with the volume without asking: write, read or
                                   none
  permits_apart                    objects with which more or less may be done
  passthrough                      whether data goes past the daemon
  pid, version                     of the process
  last_error                       the last trouble, or null
  warning                          what happened since the start that people must hear of although
                                   all goes on: the server lost what it had acknowledged; or null
  clients, client_count            of a served directory: its clients, at most 64 of them, each with
                                   host, node, connected, since, pending_records, permit and
                                   permits_apart; null of a mount. Those that are away are named if
                                   they are known to have changes that are not here
All sizes are bytes. A mount that does not answer has just mount and error.

See imz(1) for the exit codes.")]
pub struct StatusArgs {
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: Option<PathBuf>,
    /// One JSON object for a named mount, an array of them otherwise
    #[arg(long)]
    pub json: bool,
}

/// Look into journals (KML)
#[derive(Args, Debug)]
#[command(arg_required_else_help = true)]
pub struct KmlArgs {
    #[command(subcommand)]
    pub command: KmlCommand,
}

#[derive(Subcommand, Debug)]
pub enum KmlCommand {
    Dump(DumpArgs),
}

/// Print a journal, one line a record
///
/// Prints seq, time, kind, path, what changed, and the outcome. Reads the journal of a running
/// mount or server without disturbing it. A damaged journal is printed as far as it goes; then the
/// command says where and why it stopped, with exit code 6. The format is described in imz-kml(5).
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  What is going on in a mount, as it happens:
      imz kml dump --follow /mnt/projects
  The ten newest changes of a served directory:
      imz kml dump --reverse /srv/projects | head
  Who removed it, as JSON:
      imz kml dump --json --path doc/plan.txt /srv/projects

See imz(1) for the exit codes.")]
pub struct DumpArgs {
    /// A segment file, a directory with a journal in it, or a mount point
    ///
    /// A directory may be the journal itself, a cache, or a served directory.
    #[arg(value_name = "FILE|DIR|MOUNT")]
    pub path: PathBuf,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
    /// Go on with what is written from now on, until interrupted
    #[arg(long, conflicts_with_all = ["reverse", "to"])]
    pub follow: bool,
    /// Newest first
    #[arg(long)]
    pub reverse: bool,
    /// Start at a seq, or at a time like 2026-11-21T10:00:00Z (UTC)
    #[arg(long, value_name = "SEQ|TIME", value_parser = Point::parse)]
    pub from: Option<Point>,
    /// End with a seq, or with a time
    #[arg(long, value_name = "SEQ|TIME", value_parser = Point::parse)]
    pub to: Option<Point>,
    /// Only records of this path, or of what is below it
    ///
    /// As it stands in the volume, from its root, without a leading slash.
    #[arg(long = "path", value_name = "PATH")]
    pub only: Option<OsString>,
}
