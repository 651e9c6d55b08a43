//! Which mount (or server) a path on the command line means.
//!
//! A mount that hangs must not hang the question about it: the path is compared with the list of
//! mounts as text, and only its parent directory is looked at.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::{Exit, Failure, fail};
use crate::net::control::{self, ControlError};
use crate::sys::mount::{UmountError, probe, umount};
use crate::sys::{self, Errno};

/// How long a mount without a socket may take to show that it is dead.
const PROBE_TIME_MAX: Duration = Duration::from_secs(2);
/// Most dead mounts that are taken away from one mount point.
const STACK_MAX: usize = 16;

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

/// The mount that a path lies in, and the path in its volume: names with slashes between them, none
/// at the ends. Nothing in the mount is looked at, so symbolic links there are not followed, while
/// those on the way to it are.
///
/// # Errors
/// It lies in no mount of ours, or has `..` in it: exit codes 5 and 2.
pub fn inside(path: &Path) -> anyhow::Result<(Place, Vec<u8>)> {
    let Some((place, rest)) = within(path)? else {
        let what = "it lies in no imz mount; imz status lists those there are";
        return fail(Exit::NotFound, what).with_context(|| path.display().to_string());
    };
    Ok((place, rest.as_os_str().as_bytes().to_vec()))
}

/// Like [`inside`], but a path that lies in no mount of ours is no error.
///
/// # Errors
/// `/proc` is missing, or it has `..` in it: exit code 2.
pub fn within(path: &Path) -> anyhow::Result<Option<(Place, PathBuf)>> {
    let mounts = sys::mount::ours().context("/proc/self/mountinfo")?;
    let absolute = std::path::absolute(path).context("the working directory")?;
    let found = split(&absolute, &mounts, |link| std::fs::read_link(link).ok());
    let Some((mount, rest)) = found else { return Ok(None) };
    if rest.iter().any(|part| part == "..") {
        let what = "it has .. in it; say where it leads to";
        return fail(Exit::Usage, what).with_context(|| path.display().to_string());
    }
    let socket = control::socket_path(&mount);
    Ok(Some((Place { path: mount, socket, mounted: true }, rest)))
}

/// The mount point on the way down an absolute path, and what follows it. `link`: where a symbolic
/// link leads; it is asked of nothing that lies in a mount.
fn split(
    path: &Path,
    mounts: &[PathBuf],
    link: impl Fn(&Path) -> Option<PathBuf>,
) -> Option<(PathBuf, PathBuf)> {
    /// As the kernel has it.
    const LINKS_MAX: u32 = 40;
    let parts = |path: &Path| -> Vec<OsString> {
        let plain = path.components().filter(|part| !matches!(part, Component::RootDir));
        plain.map(|part| part.as_os_str().to_owned()).collect()
    };
    let mut todo = parts(path);
    todo.reverse();
    let (mut at, mut links) = (PathBuf::from("/"), 0);
    loop {
        if mounts.contains(&at) {
            todo.reverse();
            let rest: PathBuf = todo.iter().collect();
            // one in the other: the inner one is meant
            let whole = if rest.as_os_str().is_empty() { at } else { at.join(rest) };
            let mount = mounts.iter().filter(|mount| whole.starts_with(mount));
            let mount = mount.max_by_key(|mount| mount.as_os_str().len())?;
            let rest = whole.strip_prefix(mount).ok()?.to_owned();
            return Some((mount.clone(), rest));
        }
        let part = todo.pop()?;
        if part == ".." {
            at.pop();
            continue;
        }
        at.push(&part);
        if !mounts.contains(&at)
            && let Some(target) = link(&at)
        {
            links += 1;
            if links > LINKS_MAX {
                return None;
            }
            at.pop();
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            todo.extend(parts(&target).into_iter().rev());
        }
    }
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

/// Whether the mount's process has died, by `error`, which is what its socket said. A mount's socket is
/// there before the mount and goes after it: one that refuses belongs to a process that is gone, and
/// the mount needs not be touched to know that. Where there is no socket at all, a thread looks,
/// which stays behind if the mount hangs.
pub fn is_dead(place: &Place, error: &ControlError) -> bool {
    let ours = || sys::mount::owner(&place.path) == Some(sys::local::euid());
    match error {
        ControlError::Dead => ours(),
        ControlError::Absent => answers_not_connected(&place.path),
        _ => false,
    }
}

/// Takes a dead mount away, and those that died below it.
///
/// # Errors
/// The kernel, or fusermount3, does not let go of it.
pub fn clear_dead(place: &Place) -> anyhow::Result<()> {
    for _ in 0..STACK_MAX {
        match umount(&place.path, true) {
            Ok(()) => {}
            Err(UmountError::NotMounted) => break,
            Err(e) => return Err(e.into()),
        }
        if !sys::mount::ours()?.contains(&place.path) {
            break;
        }
    }
    let _ = std::fs::remove_file(&place.socket); // its owner is dead
    Ok(())
}

/// Whether every operation on the mount fails with ENOTCONN. Asks for the free room, since the
/// kernel answers a stat from what it knows.
fn answers_not_connected(mount: &Path) -> bool {
    let (tell, told) = mpsc::channel();
    let (mount, began) = (mount.to_owned(), Instant::now());
    std::thread::spawn(move || {
        let mut looked = probe(&mount);
        while is_dying(&looked) && began.elapsed() < PROBE_TIME_MAX {
            std::thread::sleep(Duration::from_millis(5));
            looked = probe(&mount);
        }
        tell.send(looked)
    });
    let looked = told.recv_timeout(PROBE_TIME_MAX);
    matches!(looked, Ok(Err(e)) if e.kind() == std::io::ErrorKind::NotConnected)
}

/// The kernel takes the rings of a dead process away a moment after its death.
fn is_dying(looked: &std::io::Result<()>) -> bool {
    let dying = [Errno::CANCELED, Errno::CONNABORTED].map(|e| Some(e.raw_os_error()));
    looked.as_ref().is_err_and(|e| dying.contains(&e.raw_os_error()))
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

    #[test]
    fn paths_in_mounts_are_found_without_a_look_into_them() {
        let mounts = [PathBuf::from("/mnt/a"), PathBuf::from("/mnt/a/b/deep")];
        let link = |path: &Path| {
            assert!(!path.starts_with("/mnt/a"), "{} lies in a mount", path.display());
            match path.to_str().unwrap() {
                "/home/l" => Some(PathBuf::from("../mnt")),
                "/home/x" => Some(PathBuf::from("/mnt/a/b")),
                "/home/loop" => Some(PathBuf::from("loop")),
                _ => None,
            }
        };
        let find = |path: &str| {
            let found = split(Path::new(path), &mounts, link);
            found.map(|(mount, rest)| format!("{} {}", mount.display(), rest.display()))
        };
        let want = |text: &str| Some(text.to_owned());
        assert_eq!(find("/mnt/a"), want("/mnt/a "));
        assert_eq!(find("/mnt/a/x/y"), want("/mnt/a x/y"));
        assert_eq!(find("/home/l/a/x"), want("/mnt/a x"));
        assert_eq!(find("/home/x/y"), want("/mnt/a b/y"));
        assert_eq!(find("/home/../mnt/a/z"), want("/mnt/a z"));
        assert_eq!(find("/mnt/ab"), None);
        assert_eq!(find("/home/loop/a"), None);
        assert_eq!(find("/mnt/a/b/deep/x"), want("/mnt/a/b/deep x"));
    }

    #[test]
    fn a_plain_directory_is_not_a_dead_mount() {
        assert!(!answers_not_connected(tempfile::tempdir().unwrap().path()));
        assert!(!answers_not_connected(Path::new("/nonexistent")));
        let path = PathBuf::from("/nonexistent");
        let place = Place { socket: path.join("x.sock"), path, mounted: true };
        assert!(!is_dead(&place, &ControlError::Dead), "nothing of ours is mounted there");
    }
}
