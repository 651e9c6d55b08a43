//! Mounting without root: fusermount3, which is root for that moment, hands the descriptor back.
//!
//! It is told of a socket by an environment variable, and sends the descriptor of /dev/fuse along
//! with one byte. The socket is its standard input: so it need not survive an exec by accident.

use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Longest message of fusermount3 that is passed on, bytes.
const SAID_LEN_MAX: u64 = 4096;

/// Mounts at `at`; `options` as fusermount3 takes them.
///
/// # Errors
/// There is no fusermount3, or what it says.
pub fn mount(at: &Path, options: &[String]) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("fusermount3");
    command.arg("-o").arg(options.join(",")).arg("--").arg(at);
    command.env("_FUSE_COMMFD", "0").env("LC_ALL", "C");
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| {
        io::Error::new(e.kind(), format!("fusermount3: {e} (Debian: apt-get install fuse3)"))
    })?;
    drop(command); // with our copy of the socket's other end: its death shows
    let received = receive(&ours);
    drop(ours);
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        // What it says is for people only.
        let _ = stderr.take(SAID_LEN_MAX).read_to_string(&mut said);
    }
    let status = child.wait()?;
    match received {
        Ok(Some(dev)) if status.success() => Ok(dev),
        Err(e) => Err(e),
        _ => Err(io::Error::other(format!("fusermount3 says: {} ({status})", said.trim()))),
    }
}

/// A value inside an option, where commas end it.
pub fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace(',', "\\,")
}

/// `None` when the other end went without sending a descriptor.
fn receive(socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let mut parts = [IoSliceMut::new(&mut byte)];
    while let Err(e) = recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
        if e != rustix::io::Errno::INTR {
            return Err(e.into());
        }
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            return Ok(descriptors.next());
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_do_not_end_a_value() {
        assert_eq!(escaped(r"a,b\c"), r"a\,b\\c");
    }

    #[test]
    fn a_helper_that_dies_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(receive(&ours).unwrap().is_none());
    }
}
