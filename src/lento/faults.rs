//! Faults that tests plant, to see that the simulation catches them (tests/simulation).
//!
//! With the feature `planted-faults` a test switches one on for its thread. Without it, which is
//! how imz is built, `is_planted` is false for ever and the compiler leaves its branches out.

/// What may be done wrong on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// promises are broken after the author of a change has its answer, instead of before
    BreakAfterReply,
    /// what one client may change is given to another without a recall
    PermitTwice,
    /// how far a client is, is not kept in the same step as its records
    CursorApart,
    /// a batch is applied although those before it are missing
    PastGap,
    /// a batch is acknowledged before it is durable
    UnsyncedAck,
    /// data that the server lacks leave the cache
    DirtyEvicted,
    /// room is given back when a record is sent, instead of when it is durable
    RoomBackEarly,
    /// a request for room that is sent again is granted again
    RoomTwice,
    /// a restart forgets what was granted
    RoomForgotten,
    /// what is granted passes the quota
    QuotaIgnored,
}

#[cfg(feature = "planted-faults")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// From now on this fault is made in this thread; `None` ends it.
#[cfg(feature = "planted-faults")]
pub fn plant(fault: Option<Fault>) {
    PLANTED.set(fault);
}

/// Whether the fault is to be made.
#[cfg(feature = "planted-faults")]
pub fn is_planted(fault: Fault) -> bool {
    PLANTED.get() == Some(fault)
}

/// Whether the fault is to be made.
#[cfg(not(feature = "planted-faults"))]
pub const fn is_planted(_: Fault) -> bool {
    false
}
