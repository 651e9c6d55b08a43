//! The command line of `imz conflicts`: definitions, and nothing else.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Look at versions that lost, and decide about them
///
/// When two clients have changed the same thing without knowing of each other, the server keeps the
/// version that came first in the tree and preserves the other one, as imz-conflicts(7) says in
/// full. These commands list, show, compare and decide. They can be given on any mount of the
/// volume, on any machine, and on the served directory while its server runs.
#[derive(Args, Debug)]
#[command(arg_required_else_help = true)]
pub struct ConflictsArgs {
    #[command(subcommand)]
    pub command: ConflictsCommand,
}

#[derive(Subcommand, Debug)]
pub enum ConflictsCommand {
    List(ConflictsListArgs),
    Show(ConflictsShowArgs),
    Diff(ConflictsDiffArgs),
    Resolve(ConflictsResolveArgs),
}

/// One line for each conflict: ID, when, who, path, what, and why it did not fit
#[derive(Args, Debug)]
#[command(after_long_help = "See imz(1) for the exit codes; 3 says that the server is away.")]
pub struct ConflictsListArgs {
    /// A mount, or a served directory
    #[arg(value_name = "MOUNT|DIR")]
    pub place: PathBuf,
    /// An array with all that is known of each
    #[arg(long)]
    pub json: bool,
}

/// All that is known of a conflict: both versions, with their clients, times and stamps
#[derive(Args, Debug)]
#[command(
    after_long_help = "See imz(1) for the exit codes; 5 says that there is no such conflict."
)]
pub struct ConflictsShowArgs {
    /// A mount, or a served directory
    #[arg(value_name = "MOUNT|DIR")]
    pub place: PathBuf,
    /// As the list names it
    #[arg(value_name = "ID")]
    pub id: String,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// What the preserved version has that the tree's has not, and the other way round
///
/// A unified diff from the tree's version (theirs) to the preserved one (mine), if both are text of
/// at most 1 MiB; otherwise their sizes and where they first differ.
#[derive(Args, Debug)]
#[command(
    after_long_help = "See imz(1) for the exit codes; 5 says that there is no such conflict."
)]
pub struct ConflictsDiffArgs {
    /// A mount, or a served directory
    #[arg(value_name = "MOUNT|DIR")]
    pub place: PathBuf,
    /// As the list names it
    #[arg(value_name = "ID")]
    pub id: String,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Decide about a conflict
///
/// The decision is carried out by the server, durably, and all mounts see it at once. What cannot
/// be carried out is refused (exit code 4) and changes nothing.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  See what there is, compare, and take the preserved version:
      imz conflicts list /mnt/projects
      imz conflicts diff /mnt/projects 2-17
      imz conflicts resolve /mnt/projects 2-17 mine
  Keep both, the preserved one as plan.txt.conflict-HOST-DATE:
      imz conflicts resolve /mnt/projects 2-17 both
  Put the preserved one elsewhere:
      imz conflicts resolve /mnt/projects 2-17 keep old/plan.txt

See imz(1) for the exit codes.")]
pub struct ConflictsResolveArgs {
    /// A mount, or a served directory
    #[arg(value_name = "MOUNT|DIR")]
    pub place: PathBuf,
    /// As the list names it
    #[arg(value_name = "ID")]
    pub id: String,
    /// What becomes of the preserved version
    #[arg(value_name = "CHOICE", value_enum)]
    pub choice: ConflictChoice,
    /// With keep: where to put it, from the volume's root; the directory must be there
    #[arg(value_name = "PATH", required_if_eq("choice", "keep"))]
    pub path: Option<String>,
    /// Only if the tree's version is still this one (list and show say which; 0: none)
    #[arg(long, value_name = "STAMP")]
    pub stamp: Option<u64>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConflictChoice {
    /// it takes the place of the tree's, which is gone then
    Mine,
    /// it is dropped, and the tree's stays
    Theirs,
    /// it is put beside the tree's, as NAME.conflict-HOST-DATE
    Both,
    /// it is put at PATH
    Keep,
}
