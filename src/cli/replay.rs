//! The command line of `imz replay`: definitions, and nothing else.

use std::path::PathBuf;

use clap::Args;

use super::options::Point;

/// Apply a journal to a copy of a tree
///
/// Carries out, in their order, the changes that a journal says, on a directory that is an older
/// copy of what the journal is about. From an old copy of a served directory and the server's
/// journal, which is the volume's history, this makes the newer tree: names, types, modes, owners,
/// times, links, extended attributes, and the contents as far as --data has them, since a journal
/// announces contents and does not hold them.
///
/// What is there already is passed over, so doing it twice changes nothing. What does not fit is
/// named, counted and left out; so is a file whose contents are missing. Nothing outside of DIR is
/// changed, no symbolic link is followed, and imz's own directories at the root stay as they are.
///
/// A copy with imz's attributes on its files (cp -a, as root) is best: each object is found by its
/// number, and says up to which record it is current. In a copy without them objects are found by
/// the paths and places in the records, from where the copy was taken on: say that with --from.
/// Replay then leaves the attributes on what it changed.
#[derive(Args, Debug)]
#[command(after_long_help = REPLAY_HELP)]
pub struct ReplayArgs {
    /// A segment file, a directory with a journal in it, or a mount point
    ///
    /// A directory may be the journal itself, a cache, or a served directory, also one that is in
    /// use.
    #[arg(value_name = "JOURNAL")]
    pub journal: PathBuf,
    /// The copy that the journal is applied to
    ///
    /// Not a directory that is being served or mounted, not a cache, nor anything below one.
    #[arg(long, value_name = "DIR")]
    pub onto: PathBuf,
    /// Pass over the records before this one
    #[arg(long, value_name = "SEQ", value_parser = clap::value_parser!(u64).range(1..))]
    pub from: Option<u64>,
    /// End with a seq, or before the first record that is later than a time
    #[arg(long, value_name = "SEQ|TIME", value_parser = Point::parse)]
    pub until: Option<Point>,
    /// Take the contents of files from this directory
    ///
    /// A served directory, a cache, or any tree. A file is looked for at its path, and by its number
    /// where it carries imz's attribute; its size, and its version where it is known, must be right.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Take the changes back, from the newest to the one that --from names
    #[arg(long, requires = "from", conflicts_with = "until")]
    pub undo: bool,
    /// Change nothing: print what would be done, one line a record
    ///
    /// What depends on a record that would be carried out is taken to fit; contents are not looked
    /// for.
    #[arg(long)]
    pub dry_run: bool,
    /// One JSON object a line, and one with the sums at the end
    #[arg(long)]
    pub json: bool,
}

const REPLAY_HELP: &str = "\
What is printed: of a dry run every record, otherwise what was left out, as imz kml dump prints it, with
a word before it and the reason behind it. At the end the sums.
  apply      the record is carried out (or, with --undo, taken back)
  standing   it has taken effect before (with --undo: it never has); nothing to do
  empty      a noop, or void: it never happened
  unsettled  the journal does not say whether it happened; it is passed over
  misfit     the tree has not what the record needs; it is left out
  lost       with --undo: a removed file's bytes are nowhere; it does not come back
  missing    a file whose contents are missing (no seq before the path); it keeps those that it had

What happens with a record:
  record                         the tree has                              so
  any, of a server's journal     its stamp or a newer one, on the          standing
                                 directories (changes of names) or on
                                 the object (all others)
  create mkdir symlink mknod     the object                                standing
                                 the name, without imz's attribute         taken for it
                                 the name, for another object              misfit
                                 no such name                              apply
  link                           the name, for the object                  standing
  rename                         the object at the new name only           standing
                                 the object at the old name, and at the    apply
                                 new one what the record says
  unlink rmdir                   the object at the name                    apply
                                 no such name                              standing
  setattr setxattr removexattr   the object                                apply
  store                          the object                                contents from --data
  any                            not what it needs, but a later record     standing
                                 of the journal takes that away
  any                            not what it needs                         misfit
A client's journal has no stamps: what can be done again without harm is done again.

How an object without imz's attribute is found, and gets its number:
  a directory in which a name changes   the record's path without its end
  what is renamed, replaced, removed    its place: the directory's number and the name
  what is changed otherwise             the record's path
  the new directory of a rename, and    the path of the first record of the journal that
  what is linked                        names it
  none of these                         misfit

What --undo takes back:
  create mkdir symlink mknod link   the name is removed
  rename                            renamed back; what it replaced is made again
  unlink rmdir                      made again, a file only if it was empty, has another name, or
                                    --data has it with its old size and time; not its extended
                                    attributes
  setattr                           set to what was; bytes that were cut off are wanted from --data
  setxattr removexattr              set to what was, or removed
  store                             cut, if it only appended; otherwise the old bytes are wanted from
                                    --data: a copy that is older than --from
Times of directories and stored files are set as the last record before --from says, if any does.

Exit code 1 says that something was left out; 4 that DIR is in use, or no copy; 5 that the journal or a
directory is not there; 6 that the journal is damaged: it was applied up to there.

Examples:
  What has changed since a backup was made, and then do it:
      imz replay /srv/projects --onto /backup/projects --data /srv/projects --dry-run
      imz replay /srv/projects --onto /backup/projects --data /srv/projects
  The tree as it was yesterday at noon:
      cp -a /backup/projects /tmp/then
      imz replay /srv/projects --onto /tmp/then --data /srv/projects --until 2026-11-20T12:00:00Z
  Take back everything from record 5120 on, in a copy:
      imz replay /srv/projects --onto /tmp/then --undo --from 5120 --data /backup/projects

See imz(1) for the exit codes.";
