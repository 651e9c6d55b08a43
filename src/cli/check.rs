//! The command lines of `imz inspect` and `imz fsck`: definitions, and nothing else.

use std::path::PathBuf;

use clap::Args;

/// Say all that imz knows of a file, a mount, a cache, a served directory or a journal
///
/// Of an object in a mount it asks the process behind the mount, and never touches the mount
/// itself: it answers also when the mount hangs. All else is read from files, without changing
/// them, whether or not they are in use.
#[derive(Args, Debug)]
#[command(after_long_help = "\
What is said of an object in a mount:
  fid, kind, size      its identity, which is its inode number as well
  stamp                the server's version that it is based on; 0: the server has not said one
  here                 the ranges whose data are in the cache
  promise              current: the server tells before anybody changes it; stale: it is fetched
                       anew at its next use; away: the server cannot be asked
  right                what may be done without asking: write, read or none
  pending              own records of it that the server has not acknowledged, the first of them
  changed              who changed it last, as far as this machine knows
  cached at            where its data are

Of an object in a served directory: fid, stamp, who changed it last (client, host, record, time),
and its path.

Examples:
  Why is this file not at the server yet?
      imz inspect /mnt/projects/plan.txt
  What would be lost with this cache?
      imz inspect /var/lib/imz/fileserver_7070__projects-1234abcd
  Which clients does this server know, and how far is each?
      imz inspect --json /srv/projects

See imz(1) for the exit codes.")]
pub struct InspectArgs {
    /// An object in a mount, a mount point, a cache, a served directory or an object in it, a state
    /// directory, a journal, or a segment of one
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Check a cache or a served directory, and repair it
///
/// Looks at everything that imz keeps: the journal's chain and segments, its cursors, every object
/// of the tree against the index and against what is noted on the object itself, data that is to
/// be shipped and is not there, what was left behind, the table of clients, and the versions that
/// lost a conflict. Prints every finding, one line each, with what can be done about it, and a
/// summary. Changes nothing unless told to repair.
///
/// A repair saves all that can be saved, and deletes nothing: what cannot stay goes to lost+found
/// (in a cache beside tree/, of a served directory in its .imz), with a report of what was done. Of
/// a damaged journal every record that verifies is carried over, also from behind the damage; the
/// numbers of those that are lost are told, and objects that they may have been about are shipped
/// once more, so that the server keeps both versions where they differ.
///
/// A directory that is in use is refused, with the process that has it.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Exit codes, as fsck(8) has them (not those of imz(1)):
  0   clean; there may be notes
  1   everything that was wrong is repaired
  4   something is wrong, and is left as it is
  8   the check could not be made: no such directory, in use, a disk that fails
  16  usage
  32  interrupted

Severities:
  note     nothing is wrong, or the next start puts it right
  warning  something is not as it should be, and nothing is lost
  error    something is lost, or imz would refuse to start

Keys of --json, one object a line:
  severity, kind, path, message    what was found; kind is a word for tools
  remedy, repairable               what a repair does, or what a person can do
  repaired                         null if nothing was tried, true, or false
  error                            why it was not repaired
The last object has the one key summary.

What is not looked at: the contents of files, of which there are no checksums. That a file of a
served directory was changed in place behind imz's back is noticed where the journal has a record of
it, or by its time of change after a clean stop.

Examples:
  Look, and change nothing:
      imz fsck /var/lib/imz/fileserver_7070__projects-1234abcd
  A mount refuses because of a damaged journal:
      imz fsck --repair /var/lib/imz/fileserver_7070__projects-1234abcd
  A served directory whose state is elsewhere:
      imz fsck /srv/src --state /var/lib/imz-server/src")]
pub struct FsckArgs {
    /// A cache, or a served directory
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Where imz serve keeps the state of this directory, if not in it
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Put right what can be put right
    #[arg(long)]
    pub repair: bool,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}
