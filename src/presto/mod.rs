//! Presto: the filter over the backing files. Operations of the kernel come in, each becomes a
//! change of the local tree with a journal record, and is answered at once.
//!
//! ```text
//!  device.rs   the mount, and the threads that read requests from /dev/fuse
//!  rings.rs    the threads that serve requests over io_uring
//!  abi.rs      the bytes of requests and replies
//!  adapter.rs  has an operation run, again after a miss, and sees to its one answer
//!  parked.rs   requests that wait, and interrupts
//!  answer.rs   what each operation does: unpack, call, encode
//!  filter.rs   what all operations share: is it here? who asks? how is a change journaled?
//!  names.rs    operations on entries of directories
//!  nameless.rs files that have no name yet
//!  attrs.rs    operations on attributes
//!  files.rs    operations on open files
//!  open.rs     the table of open files
//!  locks.rs    flock and fcntl locks: publish at unlock, validate at lock
//!  room.rs     room at the server, before anything is done here
//!  stop.rs     writers whose data the kernel moves: counted, and stopped in time
//!  mapped.rs   files that are closed, and written to through mappings
//!  pinner.rs   fetches what is pinned, and what appears there later
//!  evictor.rs  which files give up their data, and when
//! ```
//!
//! An operation is a plain function that either ends or stops with a [`filter::Stop`]: an errno,
//! or a miss. A miss names what is wanted from the server; the adapter has it fetched and calls
//! the operation again. No thread waits meanwhile. Absent on purpose: sockets, and decisions about
//! what to fetch.

pub mod abi;
pub mod adapter;
mod answer;
pub mod attrs;
pub mod device;
pub mod evictor;
pub mod files;
pub mod filter;
pub mod locks;
pub mod mapped;
mod nameless;
pub mod names;
pub mod open;
pub mod parked;
pub mod pinner;
mod rings;
pub mod room;
pub mod stop;
