//! What two nodes say to each other: one struct a message, one number each.
//!
//! The opcode stands in the frame's header (src/net/frame.rs), the body is CBOR with numbered
//! fields, so that old and new nodes read each other: a field that is not known is skipped, one
//! that is missing has its default, an opcode that is not known is answered by `Failed`.
//! Requests carry an id of their sender's; the answer repeats it. `Read` goes both ways: a client
//! fetches a file with the same message with which the server fetches what a journal announced.
//! Records travel in the journal's own encoding. 50..=59 are about room, 60..=69 about conflicts.
//!
//! Every count and length is bounded here and checked on decoding.

use minicbor::{Decode, Encode};

use super::locks::{Denied, LOCKS_MAX, Lock, LockAsk, LockHeld, LockKind};
use super::rights::Mode;
use super::room::Room;
use crate::kml::record::{Attr, Fid, PATH_LEN_MAX, Seq, Stamp};

/// Version of the protocol; both sides must speak the same.
pub const VERSION: u16 = 1;
/// Largest body of a frame, also after decompression, bytes.
pub const BODY_LEN_MAX: usize = 2 << 20;
/// Largest piece of a file in one message, bytes.
pub const RANGE_LEN_MAX: u32 = 1 << 20;
/// Contents up to this size travel inside the batch that announces them, bytes.
pub const INLINE_LEN_MAX: usize = 64 << 10;
/// A page of a listing, or a batch, is closed when it reaches this size, bytes.
pub const PAGE_LEN: usize = 512 << 10;
/// Most records in one batch.
pub const BATCH_RECORDS_MAX: usize = 1024;
/// Most objects in one `Ask`: a rename changes two directories and two objects.
pub const ASK_FIDS_MAX: usize = 8;
/// Most objects in one `Break`, `Recall` or `Changes`.
pub const FIDS_MAX: usize = 8192;
/// Longest name of a volume, bytes.
pub const VOLUME_NAME_LEN_MAX: usize = 255;
/// Most conflicts in one page, and the longest name of one, bytes.
pub const CONFLICTS_MAX: usize = 256;
pub const CONFLICT_ID_LEN_MAX: usize = 64;
/// Longest text in a refusal, bytes.
pub const WHAT_LEN_MAX: usize = 1024;

macro_rules! messages {
    ($($(#[$doc:meta])* $op:literal $name:ident,)*) => {
        /// One message of either side.
        #[derive(Clone, PartialEq, Debug)]
        pub enum Message { $($(#[$doc])* $name($name),)* }

        impl Message {
            /// The message's number in the frame's header.
            pub fn op(&self) -> u16 {
                match self { $(Message::$name(_) => $op,)* }
            }
            /// The body of the frame.
            pub fn encode(&self) -> Vec<u8> {
                let mut out = Vec::new();
                let done = match self { $(Message::$name(body) => minicbor::encode(body, &mut out),)* };
                debug_assert!(done.is_ok(), "writing to memory cannot fail");
                out
            }
            /// # Errors
            /// [`Garbled`] when the body is not what its number says, or passes a bound.
            pub fn decode(op: u16, body: &[u8]) -> Result<Message, Garbled> {
                let message = match op {
                    $($op => Message::$name(minicbor::decode(body).map_err(|_| Garbled::Body(op))?),)*
                    _ => return Err(Garbled::Unknown(op)),
                };
                if message.in_bounds() { Ok(message) } else { Err(Garbled::TooMuch(op)) }
            }
        }
        $(impl From<$name> for Message { fn from(body: $name) -> Message { Message::$name(body) } })*
    };
}

messages! {
    /// client: the first message of a connection
    1 Hello,
    /// server: the answer to `Hello`
    2 Welcome,
    /// server: the other answer to `Hello`; the connection closes after it
    3 Refused,
    /// either side: are you there?
    4 Ping,
    /// the answer to `Ping`, and to a request that has nothing else to say
    5 Pong,
    /// the answer to a request that failed
    6 Failed,
    /// client: the entries of a directory
    10 List,
    11 Page,
    /// client: one object as it is now
    12 Stat,
    13 Status,
    /// either side: bytes of a file
    14 Read,
    15 Data,
    /// client: which objects have changed since a stamp
    16 Since,
    17 Changes,
    /// client: how much room the volume has
    18 Statfs,
    19 Space,
    /// client: records of its journal, in order
    20 Batch,
    /// server: they are durable, with the objects' new stamps
    21 Acked,
    /// server: these objects change; answer with `Pong` once no reader sees the cached state
    30 Break,
    /// client: let me change these objects
    40 Ask,
    /// server: the answer to `Ask`; by itself it gives the volume
    41 Granted,
    /// server: others need this; answer with `Released` once the server has what you changed of it
    42 Recall,
    /// the answer to `Recall`, which may overtake the batches that it needs; by itself a client's
    /// farewell
    43 Released,
    /// client: sets, ends or tests a lock; the answer to one that waits comes when it is granted
    44 LockAsk,
    45 LockAnswer,
    /// client: a lock needs not be waited for any more; only the lock itself is answered
    46 LockCancel,
    /// client: these locks are held already, as decided elsewhere
    47 Claim,
    48 Claimed,
    /// client: more room, so that what is written here has its place there
    50 RoomAsk,
    /// server: the answer to `RoomAsk`; what it may take in all
    51 RoomTerms,
    /// server: others lack room; answer with `GivenBack` once nothing pends that could wait
    52 GiveBack,
    /// the answer to `GiveBack`; by itself what has become free meanwhile
    53 GivenBack,
    /// client: which conflicts are there?
    60 Conflicts,
    61 ConflictPage,
    /// client: bytes of a version that a conflict is about; answered by `Data`
    62 ConflictRead,
    /// client: somebody has decided about a conflict
    63 Resolve,
    /// it is done, durably
    64 Resolved,
    /// server, by itself: there are so many conflicts in the volume
    65 ConflictCount,
}

/// Why a body was not understood. The connection is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Garbled {
    #[error("message {0} is not known to protocol version {VERSION}")]
    Unknown(u16),
    #[error("message {0} cannot be read")]
    Body(u16),
    #[error("message {0} passes a bound")]
    TooMuch(u16),
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Hello {
    #[n(0)]
    pub version: u16,
    #[n(1)]
    pub volume: String,
    /// of the client's journal; a node number stands for one incarnation
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub incarnation: [u8; 16],
    /// the number that this server gave to this incarnation; 0 asks for one
    #[n(3)]
    pub node: u32,
    /// the volume that the cache belongs to; zeros for an empty cache
    #[n(4)]
    #[cbor(with = "minicbor::bytes")]
    pub volume_id: [u8; 16],
    /// for people: host name of the client
    #[n(5)]
    pub host: String,
    /// the newest record of the client's journal
    #[n(6)]
    pub pending: Seq,
    /// what it may do rests with it while it asks for nothing
    #[n(7)]
    pub keeps: bool,
    /// it holds locks, and claims them as soon as it may: they go ahead of others' asks
    #[n(8)]
    #[cbor(default)]
    pub locks: bool,
    /// the room that it was granted before; `None`: it writes without a reservation
    #[n(9)]
    #[cbor(default)]
    pub room: Option<RoomHeld>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Welcome {
    #[n(0)]
    pub version: u16,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub volume_id: [u8; 16],
    /// the client's number
    #[n(2)]
    pub node: u32,
    /// the newest record of this incarnation that the server keeps
    #[n(3)]
    pub acked: Seq,
    /// the volume's stamp
    #[n(4)]
    pub stamp: Stamp,
    /// the volume's name as the server knows it
    #[n(5)]
    pub volume: String,
    /// the newest record of this incarnation that the server has, durably or not
    #[n(6)]
    #[cbor(default)]
    pub seen: Seq,
    /// the room that the client has; `None`: this server reserves nothing
    #[n(7)]
    #[cbor(default)]
    pub room: Option<RoomTerms>,
    /// no change of the volume is taken
    #[n(8)]
    #[cbor(default)]
    pub read_only: bool,
}

/// Why a server turns a client away, or fails a request.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Debug)]
#[cbor(index_only)]
pub enum Code {
    #[n(0)]
    Other,
    #[n(1)]
    WrongVersion,
    #[n(2)]
    UnknownVolume,
    /// the cache belongs to another volume
    #[n(3)]
    ForeignCache,
    #[n(4)]
    TooManyClients,
    /// no object has this fid any more
    #[n(5)]
    Gone,
    /// the object is not at the stamp that was asked for
    #[n(6)]
    Moved,
    #[n(7)]
    NoSpace,
    #[n(8)]
    Io,
    /// a batch that does not follow the last one
    #[n(9)]
    Gap,
    #[n(10)]
    OutOfTurn,
    #[n(11)]
    ReadOnly,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Refused {
    #[n(0)]
    pub code: Code,
    #[n(1)]
    pub what: String,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Failed {
    #[n(0)]
    pub code: Code,
    #[n(1)]
    pub what: String,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Ping {}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Pong {
    /// server: the volume's stamp; every break up to it was sent before this message
    #[n(0)]
    pub stamp: Stamp,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct List {
    #[n(0)]
    pub dir: Fid,
    /// the last name of the page before; empty for the first page
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub after: Vec<u8>,
    /// the version of the directory whose entries are all in the cache; zero otherwise
    #[n(2)]
    pub have: Stamp,
}

/// A name alone.
#[derive(Encode, Decode, Clone, PartialEq, Eq, Debug)]
pub struct Bare {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub name: Vec<u8>,
}

/// An extended attribute.
#[derive(Encode, Decode, Clone, PartialEq, Eq, Debug)]
pub struct Xattr {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub name: Vec<u8>,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub value: Vec<u8>,
}

/// One object as the server has it.
#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Object {
    #[n(0)]
    pub fid: Fid,
    #[n(1)]
    pub stamp: Stamp,
    #[n(2)]
    pub attr: Attr,
    /// where a symbolic link leads; empty otherwise
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pub target: Vec<u8>,
    /// all but imz's own
    #[n(4)]
    pub xattrs: Vec<Xattr>,
    /// of a file: no later than at this stamp its data became what they are; `None`: not known to
    /// be before `stamp`
    #[n(5)]
    pub stored: Option<Stamp>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Entry {
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub name: Vec<u8>,
    #[n(1)]
    pub object: Object,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Page {
    /// the directory itself
    #[n(0)]
    pub dir: Object,
    /// in ascending order of their names' bytes, after the name that was asked for
    #[n(1)]
    pub entries: Vec<Entry>,
    #[n(2)]
    pub more: bool,
    /// `entries` are only those that changed since the version that the client has, and these names
    /// are gone
    #[n(3)]
    pub gone: Option<Vec<Bare>>,
    /// what the client may do with the directory from now on
    #[n(4)]
    pub mode: Mode,
    /// entries that it may read and not change, although it may change the volume
    #[n(5)]
    pub read_only: Vec<Fid>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Stat {
    #[n(0)]
    pub fid: Fid,
    /// of a file that is all in the cache: the version it is; zero otherwise
    #[n(1)]
    pub have: Stamp,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Status {
    #[n(0)]
    pub object: Object,
    /// what the client may do with it from now on
    #[n(1)]
    pub mode: Mode,
    /// of a small file whose cached version is older: all of its contents
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub data: Option<Vec<u8>>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Read {
    #[n(0)]
    pub fid: Fid,
    #[n(1)]
    pub at: u64,
    /// 1..=RANGE_LEN_MAX
    #[n(2)]
    pub len: u32,
    /// from a client: the stamp whose bytes it wants (`Failed(Moved)` when there is a newer one);
    /// from a server: zero
    #[n(3)]
    pub stamp: Stamp,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Data {
    #[n(0)]
    pub at: u64,
    /// shorter than asked for at the end of the file only
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
    /// of the whole file now, bytes
    #[n(2)]
    pub size: u64,
    /// changes whenever the file's data do: pieces of one token belong together
    #[n(3)]
    pub token: u64,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Since {
    #[n(0)]
    pub stamp: Stamp,
    /// the client wants to read all of the volume: others let go what they may change
    #[n(1)]
    pub read_all: bool,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Changes {
    /// objects that others changed after the stamp that was asked for
    #[n(0)]
    pub fids: Vec<Fid>,
    /// the answer covers all changes up to here; ask again from it while `more`
    #[n(1)]
    pub upto: Stamp,
    #[n(2)]
    pub more: bool,
    /// the history does not reach back so far: everything may have changed
    #[n(3)]
    pub lost: bool,
    /// what the client may do with the volume, once it knows all changes
    #[n(4)]
    pub volume: Mode,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Statfs {}

#[derive(Encode, Decode, Clone, Copy, PartialEq, Debug, Default)]
pub struct Space {
    /// bytes
    #[n(0)]
    pub block_len: u32,
    #[n(1)]
    pub blocks: u64,
    #[n(2)]
    pub blocks_free: u64,
    #[n(3)]
    pub blocks_available: u64,
    #[n(4)]
    pub files: u64,
    #[n(5)]
    pub files_free: u64,
}

/// One record, and the bytes of all ranges of its store in a row where they are small.
#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Item {
    /// in the journal's wire encoding
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub record: Vec<u8>,
    /// `None`: the server fetches them by `Read`
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub data: Option<Vec<u8>>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Batch {
    /// `upto` of the batch before: the server refuses a gap
    #[n(0)]
    pub after: Seq,
    /// the newest record that this batch covers (the optimiser may have dropped some between)
    #[n(1)]
    pub upto: Seq,
    #[n(2)]
    pub items: Vec<Item>,
}

/// The stamp that an object has now.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Debug)]
pub struct Stamped {
    #[n(0)]
    pub fid: Fid,
    #[n(1)]
    pub stamp: Stamp,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Acked {
    #[n(0)]
    pub upto: Seq,
    /// each object that the batch touched, with its new stamp
    #[n(1)]
    pub stamps: Vec<Stamped>,
    /// objects of which the server kept its own version; the client's is preserved there
    #[n(2)]
    pub conflicts: Vec<Fid>,
    /// the volume's stamp; every break up to it was sent before this message
    #[n(3)]
    pub stamp: Stamp,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Break {
    #[n(0)]
    pub fids: Vec<Fid>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Ask {
    /// 1..=ASK_FIDS_MAX
    #[n(0)]
    pub fids: Vec<Fid>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Granted {
    /// `Write`: for all of the volume; else only for what was asked
    #[n(0)]
    pub volume: Mode,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Recall {
    /// objects, of which no more than `mode` is left
    #[n(0)]
    pub fids: Vec<Fid>,
    /// or, without any, the whole volume
    #[n(1)]
    pub mode: Mode,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Released {
    /// of the objects that were recalled: those which the client goes on reading, if it may
    #[n(0)]
    pub kept: Vec<Fid>,
    /// once the server has the client's records up to here
    #[n(1)]
    pub upto: Seq,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct LockAnswer {
    /// `None`: done
    #[n(0)]
    pub why: Option<Denied>,
    /// the answer to a test: who is in the way
    #[n(1)]
    pub held: Option<LockHeld>,
    /// other clients hold locks of the object, or wait for them
    #[n(2)]
    pub others: bool,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct LockCancel {
    /// of the request that asked for the lock
    #[n(0)]
    pub id: u64,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Claim {
    /// these are all locks: what else the server thinks that this client holds has ended
    #[n(0)]
    pub fresh: bool,
    #[n(1)]
    pub locks: Vec<Lock>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Claimed {
    /// places in the claim of those that others have taken
    #[n(0)]
    pub lost: Vec<u32>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Conflicts {
    /// the last one of the page before; empty for the first page
    #[n(0)]
    pub after: String,
}

/// One conflict: its name, and JSON that says all about it (imz-conflicts(7)).
#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Conflict {
    #[n(0)]
    pub id: String,
    #[n(1)]
    pub told: String,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct ConflictPage {
    #[n(0)]
    pub conflicts: Vec<Conflict>,
    #[n(1)]
    pub more: bool,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct ConflictRead {
    #[n(0)]
    pub id: String,
    /// of the preserved version; else of the tree's
    #[n(1)]
    pub mine: bool,
    #[n(2)]
    pub at: u64,
    /// 1..=RANGE_LEN_MAX
    #[n(3)]
    pub len: u32,
}

/// What becomes of a preserved version.
#[derive(Encode, Decode, Clone, PartialEq, Eq, Debug)]
pub enum Choice {
    /// it takes the place of the tree's
    #[n(0)]
    Mine,
    /// it is dropped
    #[n(1)]
    Theirs,
    /// it is put beside the tree's
    #[n(2)]
    Both,
    /// it is put at this path, from the volume's root
    #[n(3)]
    Keep(
        #[n(0)]
        #[cbor(with = "minicbor::bytes")]
        Vec<u8>,
    ),
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Resolve {
    #[n(0)]
    pub id: String,
    #[n(1)]
    pub choice: Choice,
    /// of the tree's version that was looked at, zero for none; `None`: whatever it is
    #[n(2)]
    pub stamp: Option<Stamp>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct Resolved {
    /// for people
    #[n(0)]
    pub what: String,
    /// objects that have changed
    #[n(1)]
    pub fids: Vec<Fid>,
}

#[derive(Encode, Decode, Clone, PartialEq, Debug)]
pub struct ConflictCount {
    #[n(0)]
    pub count: u64,
}

/// What a client knows of its room: both figures only grow, as long as the ledger is the same.
#[derive(Encode, Decode, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RoomHeld {
    /// of the server's ledger; 0: none is known
    #[n(0)]
    pub epoch: u64,
    /// all that it heard to be granted
    #[n(1)]
    pub granted: Room,
    /// all that it gave back, durable records included
    #[n(2)]
    pub returned: Room,
}

#[derive(Encode, Decode, Clone, Copy, PartialEq, Debug)]
pub struct RoomAsk {
    #[n(0)]
    pub held: RoomHeld,
    /// someone waits for so much more
    #[n(1)]
    pub need: Room,
    /// others were not to give back what they do not use: it is asked ahead
    #[n(2)]
    pub ahead: bool,
}

#[derive(Encode, Decode, Clone, Copy, PartialEq, Debug)]
pub struct RoomTerms {
    #[n(0)]
    pub epoch: u64,
    /// all that this client was ever granted
    #[n(1)]
    pub granted: Room,
    /// and all that it gave back
    #[n(2)]
    pub returned: Room,
    /// there is so much that the client needs not count each write
    #[n(3)]
    pub ample: bool,
    /// there is not what was needed
    #[n(4)]
    pub short: bool,
    /// how long what was granted is kept for a client that is away, milliseconds
    #[n(5)]
    pub keep_ms: u64,
}

#[derive(Encode, Decode, Clone, Copy, PartialEq, Debug)]
pub struct GiveBack {}

#[derive(Encode, Decode, Clone, Copy, PartialEq, Debug)]
pub struct GivenBack {
    #[n(0)]
    pub held: RoomHeld,
}

impl Message {
    /// For people who look for a fault: the message without what is long in it.
    pub fn brief(&self) -> String {
        match self {
            Message::Page(m) => {
                let (count, gone) = (m.entries.len(), m.gone.as_ref().map(Vec::len));
                let (dir, stamp) = (m.dir.fid, m.dir.stamp.0);
                format!("Page {dir} at {stamp}: {count} entries, gone {gone:?}, {:?}", m.mode)
            }
            Message::Status(m) => {
                let len = m.data.as_ref().map(Vec::len);
                format!(
                    "Status {} at {}: {:?}, data {len:?}",
                    m.object.fid, m.object.stamp.0, m.mode
                )
            }
            Message::Batch(m) => {
                format!("Batch {}..{}: {} records", m.after.0, m.upto.0, m.items.len())
            }
            Message::Data(m) => format!("Data {} of {} bytes", m.at, m.bytes.len()),
            other => format!("{other:?}"),
        }
    }
    fn in_bounds(&self) -> bool {
        let object = |o: &Object| o.target.len() <= 4095 && o.xattrs.len() <= 1024;
        match self {
            Message::Hello(m) => {
                let room = m.room.is_none_or(|held| held.is_sane());
                let names = [&m.volume, &m.host];
                room && names.iter().all(|name| name.len() <= VOLUME_NAME_LEN_MAX)
            }
            Message::Welcome(m) => m.room.is_none_or(|terms| terms.is_sane()),
            Message::RoomAsk(m) => m.held.is_sane() && m.need.is_sane(),
            Message::RoomTerms(m) => m.is_sane(),
            Message::GivenBack(m) => m.held.is_sane(),
            Message::Refused(m) => m.what.len() <= WHAT_LEN_MAX,
            Message::Failed(m) => m.what.len() <= WHAT_LEN_MAX,
            Message::List(m) => m.after.len() <= 255,
            Message::Page(m) => {
                let mut gone = m.gone.iter().flatten();
                object(&m.dir)
                    && m.entries.iter().all(|e| e.name.len() <= 255 && object(&e.object))
                    && gone.all(|bare| bare.name.len() <= 255)
            }
            Message::Status(m) => {
                object(&m.object) && m.data.as_ref().is_none_or(|d| d.len() <= INLINE_LEN_MAX)
            }
            Message::Read(m) => (1..=RANGE_LEN_MAX).contains(&m.len),
            Message::Data(m) => m.bytes.len() <= RANGE_LEN_MAX as usize,
            Message::Changes(m) => m.fids.len() <= FIDS_MAX,
            Message::Batch(m) => m.items.len() <= BATCH_RECORDS_MAX && m.after <= m.upto,
            Message::Break(m) => m.fids.len() <= FIDS_MAX,
            Message::Ask(m) => (1..=ASK_FIDS_MAX).contains(&m.fids.len()),
            Message::Recall(m) => m.fids.len() <= FIDS_MAX,
            Message::Released(m) => m.kept.len() <= FIDS_MAX,
            Message::LockAsk(m) => m.start <= m.end,
            Message::Claim(m) => m.locks.len() <= LOCKS_MAX && m.locks.iter().all(is_lock),
            Message::Claimed(m) => m.lost.len() <= LOCKS_MAX,
            Message::Conflicts(m) => m.after.len() <= CONFLICT_ID_LEN_MAX,
            Message::ConflictPage(m) => m.conflicts.len() <= CONFLICTS_MAX,
            Message::ConflictRead(m) => {
                m.id.len() <= CONFLICT_ID_LEN_MAX && (1..=RANGE_LEN_MAX).contains(&m.len)
            }
            Message::Resolve(m) => {
                let path_len = if let Choice::Keep(path) = &m.choice { path.len() } else { 0 };
                m.id.len() <= CONFLICT_ID_LEN_MAX && path_len <= PATH_LEN_MAX
            }
            Message::Resolved(m) => m.fids.len() <= FIDS_MAX,
            _ => true,
        }
    }
}

impl RoomHeld {
    fn is_sane(&self) -> bool {
        self.granted.is_sane() && self.returned.is_sane()
    }
}

impl RoomTerms {
    fn is_sane(&self) -> bool {
        self.granted.is_sane() && self.returned.is_sane()
    }
}

/// A flock lock covers all bytes, and what is held is no unlocking.
fn is_lock(lock: &Lock) -> bool {
    let LockHeld { kind, start, end, .. } = lock.held;
    let whole = (start, end) == (0, u64::MAX);
    start <= end && kind != LockKind::Unlock && (whole || !lock.flock)
}
