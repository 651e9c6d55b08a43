//! Which mount (or server) a path on the command line means.
//!
//! A mount that hangs must not hang the question about it: the path is compared with the list of
//! mounts as text, and only its parent directory is looked at.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::{Exit, Failure, fail};
use crate::net::control;
use crate::sys;

/// A mount or a served directory, and where its process answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// absolute
    pub path: PathBuf,
    pub socket: PathBuf,
    /// whether it is a mount point; if not, a process answers for the directory nevertheless
    pub mounted: bool,
}

/// The mount or the served directory that `path` means.
///
/// # Errors
/// There is none: exit code 5.
pub fn find(path: &Path) -> anyhow::Result<Place> {
    match look(path)? {
        Some(place) => Ok(place),
        None if std::fs::symlink_metadata(path).is_err() => {
            fail(Exit::NotFound, "there is no such directory")
        }
        None => fail(Exit::NotFound, "it is not an imz mount; imz status lists those there are"),
    }
    .with_context(|| path.display().to_string())
}

/// Like [`find`], but a path that is no place of ours is no error.
///
/// # Errors
/// `/proc` is missing, or the working directory.
pub fn look(path: &Path) -> anyhow::Result<Option<Place>> {
    let mounts = sys::mount::ours().context("/proc/self/mountinfo")?;
    look_in(path, &mounts, control::socket_path).context("the working directory")
}

fn look_in(
    path: &Path,
    mounts: &[PathBuf],
    socket_path: impl Fn(&Path) -> PathBuf,
) -> std::io::Result<Option<Place>> {
    let place = |path: &Path| {
        let (socket, mounted) = (socket_path(path), mounts.iter().any(|it| it == path));
        let known = mounted || socket.exists();
        known.then(|| Place { path: path.to_owned(), socket, mounted })
    };
    // as text; this also drops `.` and doubled or trailing slashes
    let absolute: PathBuf = std::path::absolute(path)?.components().collect();
    if let Some(found) = place(&absolute) {
        return Ok(Some(found));
    }
    // with the links in the directories above it resolved
    if let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name())
        && let Ok(parent) = parent.canonicalize()
        && let Some(found) = place(&parent.join(name))
    {
        return Ok(Some(found));
    }
    // no mount of ours has this name, so it is safe to look at it: a link, most likely
    Ok(absolute.canonicalize().ok().and_then(|real| place(&real)))
}

/// The error for a place whose process does not answer.
pub fn unanswered(error: control::ControlError) -> anyhow::Error {
    let advice = match &error {
        control::ControlError::Dead => {
            "imz umount cleans it up; nothing is lost, the next mount of its cache goes on"
        }
        control::ControlError::Absent => "another user's, or one that is just starting",
        _ => "",
    };
    let error = anyhow::Error::from(error);
    match advice {
        "" => error,
        advice => {
            let what = format!("{error:#}: {advice}");
            Failure::new(Exit::Failure, what).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_text_by_parent_and_by_link() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("real/mnt")).unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        std::os::unix::fs::symlink("real/mnt", root.join("to_mnt")).unwrap();
        // the first does not exist: found all the same, so nobody looked into it
        let mounts = [root.join("hung"), root.join("real/mnt")];
        let socket = |_: &Path| root.join("no.sock");
        let find = |path: &str| {
            let found = look_in(&root.join(path), &mounts, socket).unwrap();
            found.map(|place| (place.path.strip_prefix(&root).unwrap().to_owned(), place.mounted))
        };
        let want = |path: &str| Some((PathBuf::from(path), true));
        assert_eq!(find("hung"), want("hung"));
        assert_eq!(find("./hung//"), want("hung"));
        assert_eq!(find("link/mnt"), want("real/mnt"));
        assert_eq!(find("real/../link/mnt/"), want("real/mnt"));
        assert_eq!(find("to_mnt"), want("real/mnt"));
        assert_eq!(find("real"), None);
        assert_eq!(find("absent/mnt"), None);
    }

    #[test]
    fn a_served_directory_is_found_by_its_socket() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        std::fs::write(root.join("served.sock"), "").unwrap();
        std::fs::create_dir(root.join("served")).unwrap();
        let socket = |path: &Path| path.with_extension("sock");
        let found = look_in(&root.join("served"), &[], socket).unwrap().unwrap();
        assert_eq!((found.path, found.mounted), (root.join("served"), false));
    }
}
