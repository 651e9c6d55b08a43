//! The command line of `imz volume`: definitions, and nothing else.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::options::{self, Bound, UserBound};

/// Create, list, change, rename and remove the volumes of a running server
///
/// Asks the imz serve that runs on this machine as the same user, over its control socket; clients go
/// on meanwhile. Of several servers --server says which one. What a server that was started with
/// --config is told is written into that file as well, whose comments stay. Otherwise limits, mode
/// and name are kept with the volume and survive a restart, and which volumes there are says the
/// server's command line.
#[derive(Args, Debug)]
#[command(arg_required_else_help = true)]
pub struct VolumeArgs {
    #[command(subcommand)]
    pub command: VolumeCommand,
    /// Which server: its process id, a directory that it serves, or its control socket
    #[arg(long, value_name = "PID|DIR|SOCKET", global = true)]
    pub server: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
pub enum VolumeCommand {
    Create(VolumeCreateArgs),
    List(VolumeListArgs),
    Set(VolumeSetArgs),
    Rename(VolumeRenameArgs),
    Remove(VolumeRemoveArgs),
}

/// Serve one more directory as a volume, at once
///
/// The directory exists; it is served as it is. Where the server was started with --config, the
/// volume is added to that file; otherwise it is served until the server ends, and the command says
/// so.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  A volume of at most 200 GiB and a million files:
      imz volume create photos /srv/photos --quota 200G --quota-files 1000000

See imz(1) for the exit codes.")]
pub struct VolumeCreateArgs {
    /// What clients call it: HOST:/NAME
    #[arg(value_name = "NAME", value_parser = options::volume_name)]
    pub name: String,
    /// An existing directory that no server serves
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Clients may read it, and not change it
    #[arg(long)]
    pub read_only: bool,
}

/// What a volume may hold.
#[derive(Args, Debug)]
pub struct LimitArgs {
    /// How much its files may hold in all: 200M, 1T; none for no limit but the disk
    ///
    /// Units are K, M, G and T, in powers of 1024; a plain number is bytes.
    #[arg(long, value_name = "SIZE|none", value_parser = Bound::size)]
    pub quota: Option<Bound>,
    /// How many files, directories and links it may have in all; none for no limit
    #[arg(long, value_name = "COUNT|none", value_parser = Bound::count)]
    pub quota_files: Option<Bound>,
    /// How much the files of one user may hold, by user id; may be given again and again
    ///
    /// Kept and shown, and not enforced by this version.
    #[arg(long, value_name = "UID=SIZE|none", value_parser = UserBound::parse)]
    pub user_quota: Vec<UserBound>,
}

/// List a server's volumes: what they hold, and for whom
///
/// Shows for each volume its name, directory, mode, what its files take (USED), what is promised to
/// clients besides (GRANTED), what it can hold in all (CAPACITY), the clients that are connected, and
/// those with changes that are not here yet (PENDING). A figure that is not known is a dash.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Keys of --json, an array with an object a volume:
  name, dir, mode                  mode is rw or ro
  quota_bytes, quota_files         the volume's limits, or null
  used_bytes, used_files, granted_bytes, granted_files, capacity_bytes, capacity_files
                                   or null where they are not known
  clients, pending_clients         how many
  users                            limits of users: uid, quota_bytes

See imz(1) for the exit codes.")]
pub struct VolumeListArgs {
    /// The limits of users as well
    #[arg(long)]
    pub users: bool,
    /// An array of JSON objects
    #[arg(long)]
    pub json: bool,
}

/// Change a volume's limits, or whether it may be changed
///
/// A volume is made read-only in order: its clients hand in what they have changed, and from then on
/// get EROFS. That takes a moment; when a client does not hand in everything within 15 seconds, or
/// one that is away is known to have changes, the command is refused and names it. With --force the
/// volume becomes read-only all the same: such changes wait at their client, which says so in imz
/// status, and are taken when the volume may be changed again. Nothing is lost.
///
/// A limit below what the volume holds, or has promised to clients, is refused but for --force; then
/// nothing more is taken until there is room.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  No limit any more, but for the user 1000:
      imz volume set photos --quota none --user-quota 1000=20G
  Nobody changes it while it is copied:
      imz volume set photos --mode ro

See imz(1) for the exit codes; 4 says that clients stand against it.")]
pub struct VolumeSetArgs {
    #[arg(value_name = "NAME", help = "The volume")]
    pub name: String,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Whether clients may change it
    #[arg(long, value_name = "MODE")]
    pub mode: Option<VolumeMode>,
    /// Although clients have changes that are not here, or a limit is below what is taken
    #[arg(long)]
    pub force: bool,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum VolumeMode {
    /// read and write
    Rw,
    /// read only
    Ro,
}

/// Give a volume another name; its clients go on
///
/// A volume is what its id says, not its name: mounts stay, also over a restart of either side, and
/// caches find their volume under the old name. New mounts need the new one.
#[derive(Args, Debug)]
#[command(after_long_help = "See imz(1) for the exit codes.")]
pub struct VolumeRenameArgs {
    #[arg(value_name = "OLD", help = "The volume")]
    pub name: String,
    /// What clients are to call it
    #[arg(value_name = "NEW", value_parser = options::volume_name)]
    pub to: String,
}

/// Serve a volume no more; its files stay where they are
///
/// Refused while clients are connected, or are known to have changes that are not here, and says
/// which. With --force their connections are closed: they go on with what is in their caches, and say
/// in imz status that the volume is not served; what they change is taken if it ever is again. Its
/// state (.imz) stays as well, so that imz volume create brings the same volume back.
#[derive(Args, Debug)]
#[command(after_long_help = "See imz(1) for the exit codes; 4 says that clients stand against it.")]
pub struct VolumeRemoveArgs {
    #[arg(value_name = "NAME", help = "The volume")]
    pub name: String,
    /// Although clients use it
    #[arg(long)]
    pub force: bool,
}
