//! FUSE over io_uring: a ring, and the places in memory where requests arrive. The only file that
//! names io_uring.
//!
//! ```text
//!  a place:  registered --> with the kernel --> [Event::Request] ours --> answered --+
//!                                 ^                                                  |
//!                                 +---------- one command does both -----------------+
//!
//!  its memory    at   len
//!                 0   128  struct fuse_in_header; later struct fuse_out_header
//!               128   128  the operation's fixed part
//!               256    32  flags, commit id, length of the payload, padding
//!              4096     -  the payload: names and data; later the answer's body
//! ```
//!
//! A ring belongs to one thread, on which the kernel fills the places: all but [`Bell::ring`] is
//! done there. A place that is with the kernel is not looked at. Source:
//! Documentation/filesystems/fuse/fuse-io-uring.rst, fs/fuse/dev_uring.c.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::squeue::Entry128;
use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode};
use rustix::event::EventfdFlags;
use rustix::thread::CpuSet;

use super::Errno;

/// Commands of `enum fuse_uring_cmd`.
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;
/// Where things are in a place's memory.
const AT_FIXED: usize = 128;
const AT_COMMIT_ID: usize = 264;
const AT_PAYLOAD_LEN: usize = 272;
const AT_PAYLOAD: usize = 4096;
/// Length of all of `struct fuse_uring_req_header`.
const HEADERS_LEN: usize = 288;
/// Commands that are handed over at once.
const BATCH_MAX: u32 = 64;
/// Completions that have room; more wait in the kernel.
const COMPLETIONS_MAX: u32 = 1024;
/// Whose completion is the bell's.
const BELL: u64 = u64::MAX;

const _: () = assert!(AT_PAYLOAD >= HEADERS_LEN && size_of::<Entry128>() == 128);

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// a request is at this place
    Request(u32),
    /// somebody rang
    Bell,
    /// the kernel will not use the place any more
    Ended(Errno),
}

/// A request as it stands at a place: its head, fixed part and payload, the first two with more
/// room than they need.
pub struct Arrived<'a> {
    pub head: &'a [u8],
    pub fixed: &'a [u8],
    pub payload: &'a [u8],
}

struct Place {
    memory: Vec<u8>,
    /// the two parts of the memory, as the kernel is told of them
    parts: Box<[libc::iovec; 2]>,
    queue: u16,
    commit_id: u64,
    holder: Holder,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Holder {
    Kernel,
    Ours,
    /// refused by the kernel, for good
    Nobody,
}

/// Wakes the ring's thread, from any other one.
#[derive(Clone)]
pub struct Bell(Arc<OwnedFd>);

impl Bell {
    pub fn ring(&self) {
        // It fails only when it has been rung 2^64 times.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// A ring of one thread.
pub struct Ring {
    uring: IoUring<Entry128, cqueue::Entry>,
    dev: Arc<OwnedFd>,
    places: Vec<Place>,
    payload_len: usize,
    bell: Bell,
    /// what was read from the bell
    rung: Box<[u8; 8]>,
}

// SAFETY: the pointers in it lead to memory that it owns (places, the count of the bell), or that
// the kernel shares with it; nothing in it belongs to the thread that made it.
#[allow(unsafe_code)]
unsafe impl Send for Ring {}

impl Ring {
    /// A ring that does nothing until it is started. `payload_len`: the longest payload, bytes.
    ///
    /// # Errors
    /// io_uring is not there, or not allowed.
    pub fn new(dev: Arc<OwnedFd>, payload_len: usize) -> io::Result<Ring> {
        let mut builder = IoUring::<Entry128, cqueue::Entry>::builder();
        builder.setup_r_disabled().setup_single_issuer().setup_defer_taskrun();
        builder.setup_submit_all().setup_cqsize(COMPLETIONS_MAX).dontfork();
        let uring = builder.build(BATCH_MAX)?;
        let bell = Bell(Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?));
        let (places, rung) = (Vec::new(), Box::new([0; 8]));
        Ok(Ring { uring, dev, places, payload_len, bell, rung })
    }

    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// From now on the ring belongs to this thread.
    pub fn start(&mut self) -> io::Result<()> {
        self.uring.submitter().register_enable_rings()?;
        self.listen()
    }

    /// Has the next ring of the bell reported.
    fn listen(&mut self) -> io::Result<()> {
        let into = self.rung.as_mut_ptr();
        let read = opcode::Read::new(Fd(self.bell.0.as_raw_fd()), into, 8).build().user_data(BELL);
        self.push(read.into())
    }

    /// A new place, with the kernel, for requests of processors whose number is `queue`.
    pub fn add(&mut self, queue: u16) -> io::Result<()> {
        // Zeros that nobody touches take no room.
        let mut memory = vec![0; AT_PAYLOAD + self.payload_len];
        let at = memory.as_mut_ptr();
        let part = |at: *mut u8, len| libc::iovec { iov_base: at.cast(), iov_len: len };
        let payload = at.wrapping_add(AT_PAYLOAD);
        let parts = Box::new([part(at, HEADERS_LEN), part(payload, self.payload_len)]);
        let number = self.places.len() as u64;
        let mut entry = self.command(REGISTER, queue, 0, Some(parts.as_ptr() as u64), number);
        set_len(&mut entry, parts.len() as u32);
        self.places.push(Place { memory, parts, queue, commit_id: 0, holder: Holder::Kernel });
        debug_assert!(self.places.last().is_some_and(|it| it.parts[0].iov_len == HEADERS_LEN));
        self.push(entry)
    }

    /// `struct fuse_uring_cmd_req`: flags, commit id, queue, padding.
    fn command(&self, code: u32, queue: u16, id: u64, addr: Option<u64>, place: u64) -> Entry128 {
        let mut rest = [0; 80];
        rest[8..16].copy_from_slice(&id.to_ne_bytes());
        rest[16..18].copy_from_slice(&queue.to_ne_bytes());
        let dev = Fd(self.dev.as_raw_fd());
        opcode::UringCmd80::new(dev, code).cmd(rest).addr(addr).build().user_data(place)
    }

    #[allow(unsafe_code)]
    fn push(&mut self, entry: Entry128) -> io::Result<()> {
        // SAFETY: what an entry points to outlives its use by the kernel: parts and memory of
        // places are never freed (see Drop), the count of the bell lives as long as the ring.
        if unsafe { self.uring.submission().push(&entry) }.is_ok() {
            return Ok(());
        }
        self.uring.submit()?;
        // SAFETY: as above.
        unsafe { self.uring.submission().push(&entry) }.map_err(io::Error::other)
    }

    /// Hands over what is to be handed over, waits until something has happened, adds it to
    /// `events`.
    pub fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        match self.uring.submit_and_wait(1) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {} // completions are to be taken
            Err(e) => return Err(e),
        }
        let mut rung = false;
        for entry in self.uring.completion() {
            let (number, result) = (entry.user_data(), entry.result());
            if number == BELL {
                rung = true;
                events.push(Event::Bell);
            } else if let Some(place) = self.places.get_mut(number as usize) {
                if result < 0 {
                    place.holder = Holder::Nobody;
                    events.push(Event::Ended(Errno::from_raw_os_error(-result)));
                } else {
                    place.holder = Holder::Ours;
                    place.commit_id = u64::from_ne_bytes(field(&place.memory, AT_COMMIT_ID));
                    events.push(Event::Request(number as u32));
                }
            }
        }
        if rung { self.listen() } else { Ok(()) }
    }

    /// The request at a place that is ours.
    pub fn arrived(&self, place: u32) -> Option<Arrived<'_>> {
        let place = self.places.get(place as usize).filter(|place| place.holder == Holder::Ours)?;
        let (headers, payload) = place.memory.split_at(AT_PAYLOAD);
        let len = u32::from_ne_bytes(field(headers, AT_PAYLOAD_LEN)) as usize;
        let (head, fixed) = headers[..AT_FIXED * 2].split_at(AT_FIXED);
        Some(Arrived { head, fixed, payload: payload.get(..len)? })
    }

    /// Answers the request at a place, which is with the kernel then.
    pub fn answer(&mut self, place: u32, head: &[u8; 16], body: &[u8]) -> io::Result<()> {
        let number = u64::from(place);
        let Some(place) =
            self.places.get_mut(place as usize).filter(|place| place.holder == Holder::Ours)
        else {
            return Ok(());
        };
        let (headers, payload) = place.memory.split_at_mut(AT_PAYLOAD);
        let Some(room) = payload.get_mut(..body.len()) else {
            return Err(io::Error::other("an answer has no room in its place"));
        };
        room.copy_from_slice(body);
        headers[..16].copy_from_slice(head);
        let len = (body.len() as u32).to_ne_bytes();
        headers[AT_PAYLOAD_LEN..AT_PAYLOAD_LEN + 4].copy_from_slice(&len);
        place.holder = Holder::Kernel;
        let (queue, id) = (place.queue, place.commit_id);
        let entry = self.command(COMMIT_AND_FETCH, queue, id, None, number);
        self.push(entry)
    }

    /// How many places a queue has: all, and those that are with the kernel.
    pub fn count(&self, queue: u16) -> (usize, usize) {
        let of_queue = || self.places.iter().filter(|place| place.queue == queue);
        (of_queue().count(), of_queue().filter(|place| place.holder == Holder::Kernel).count())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel lets go of a ring some time after it was closed, and may fill a place until
        // then. A ring ends with its mount, and with that the process.
        std::mem::forget(std::mem::take(&mut self.places));
        std::mem::forget(std::mem::take(&mut self.rung));
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

/// Sets `sqe->len`, which the crate has no way to set for a command.
#[allow(unsafe_code)]
fn set_len(entry: &mut Entry128, len: u32) {
    const AT_LEN: usize = 24;
    // SAFETY: the type is, byte by byte, the kernel's struct io_uring_sqe of 128 bytes (asserted
    // above), in which an aligned u32 stands there.
    unsafe { std::ptr::from_mut(entry).byte_add(AT_LEN).cast::<u32>().write(len) }
}

/// How many processors this machine may ever have: the kernel wants a queue for each.
pub fn processors() -> io::Result<u16> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    last_of(&text)
        .and_then(|last| last.checked_add(1))
        .ok_or_else(|| io::Error::other(format!("not a list of processors: {text}")))
}

/// The last number of a list such as `0-3,8`.
fn last_of(list: &str) -> Option<u16> {
    list.trim().rsplit([',', '-']).next()?.parse().ok()
}

/// Keeps this thread on one processor, where that is possible.
pub fn stay_on(processor: u16) {
    let mut set = CpuSet::new();
    if usize::from(processor) < CpuSet::MAX_CPU {
        set.set(processor.into());
        // It may be switched off, or not be ours: then the thread goes where it likes.
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_end_with_the_last() {
        for (list, last) in [("0\n", Some(0)), ("0-127\n", Some(127)), ("0-3,8", Some(8))] {
            assert_eq!(last_of(list), last, "{list}");
        }
        assert_eq!(last_of(""), None);
        assert!(processors().unwrap() >= 1);
    }

    #[test]
    fn a_bell_is_heard_from_another_thread() {
        let dev = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let Ok(mut ring) = Ring::new(dev, 4096) else {
            eprintln!("skipped: no io_uring here");
            return;
        };
        let bell = ring.bell();
        ring.start().unwrap();
        for _ in 0..3 {
            let bell = bell.clone();
            std::thread::spawn(move || bell.ring()).join().unwrap();
            let mut events = Vec::new();
            ring.wait(&mut events).unwrap();
            assert_eq!(events, [Event::Bell]);
        }
        // what is no FUSE session refuses
        ring.add(0).unwrap();
        let mut events = Vec::new();
        ring.wait(&mut events).unwrap();
        assert!(matches!(events[..], [Event::Ended(_)]), "{events:?}");
        assert!(ring.arrived(0).is_none() && ring.arrived(7).is_none());
        assert_eq!(ring.count(0), (1, 0));
    }
}
