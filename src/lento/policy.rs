//! Policy: every decision of meaning that a client takes, and nothing else.
//!
//! Plain functions of what they are told; whoever wants imz to decide otherwise changes it here.
//! No state, no clock, no chance: the caller brings them as arguments.

use std::time::Duration;

use super::rights::Mode;
use super::room::Room;

/// How long a change rests in the journal before it is shipped, so that a file that lives shorter
/// never leaves the machine. A mount option sets another.
pub const AGE: Duration = Duration::from_secs(2);
/// So many unshipped bytes are shipped at once, whatever their age.
pub const SHIP_LEN: u64 = 256 << 20;
/// So many unshipped records are shipped at once, whatever their age.
pub const SHIP_COUNT: u64 = 100_000;
/// Batches under way at one time.
pub const WINDOW: usize = 4;
/// A batch that nothing happened to for so long means that the connection is of no use.
pub const SHIP_STALL: Duration = Duration::from_secs(120);
/// Pieces of files under way at one time.
pub const READS_MAX: usize = 8;
/// Most granules that are fetched before anybody asked for them.
pub const READ_AHEAD_MAX: u32 = 4;
/// How often a listing is begun again because its directory changed meanwhile; after that it
/// stands as it is, and stays stale.
pub const RELIST_MAX: u32 = 3;
/// A server that says nothing for so long is away. No want waits longer for one.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that broke, or that cannot be made, is waited for so long: the server may only be
/// starting again. From then on it counts as away, and nobody waits for it.
pub const RETURN: Duration = Duration::from_secs(3);
/// After so much silence the server is asked whether it is there: half of the [`lease`].
pub const PING_AFTER: Duration = Duration::from_secs(4);
/// First and longest pause between attempts to connect.
pub const RETRY_MIN: Duration = Duration::from_millis(100);
pub const RETRY_MAX: Duration = Duration::from_secs(10);
/// A client that asked for nothing for so long does not mind that another may change everything.
pub const IDLE: Duration = Duration::from_secs(2);
/// What was given is kept at least for so long, so that who asked for it can use it: an operation
/// of an application is several of the kernel's.
pub const HOLD: Duration = Duration::from_millis(1);
/// In larger companies nobody reads a whole volume: every change would be told to everybody.
pub const READ_ALL_CLIENTS_MAX: usize = 64;
/// A client that has to ask so often within [`ASKS_WITHIN`] wants to read the whole volume.
pub const ASKS_MAX: usize = 8;
pub const ASKS_WITHIN: Duration = Duration::from_secs(1);
/// Data of pinned objects that appear by and by come at no more than so many bytes a second, and no
/// more than so many questions.
pub const PIN_RATE: u64 = 16 << 20;
pub const PIN_ASKS: u32 = 500;
/// First and longest pause between two looks at what is pinned.
pub const PIN_REST_MIN: Duration = Duration::from_secs(1);
pub const PIN_REST_MAX: Duration = Duration::from_secs(600);
/// So often what is pinned is looked at, whatever was heard.
pub const PIN_LOOK: Duration = Duration::from_secs(600);
/// What was used so recently is not evicted to keep a limit: who fetched it is about to read it.
pub const EVICT_REST: Duration = Duration::from_secs(2);
/// How often the stamp up to which the cache is current is written down.
pub const SAVE_EVERY: Duration = Duration::from_secs(30);

/// With so much granted and free, the kernel may write by itself for [`LOOK_EVERY`], bytes.
pub const AMPLE_LEN: u64 = 256 << 20;
/// How often it is looked what the kernel wrote by itself.
pub const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The same where room comes to its end, and how often the kernel is made to ask then.
pub const LOOK_CLOSELY: Duration = Duration::from_millis(3);
/// How often it is tried to have writers that rest ask.
pub const REST_EVERY: Duration = Duration::from_millis(200);
/// Most that is granted to one client ahead of its need.
pub const AHEAD_MAX: Room = Room::new(1 << 30, 1 << 20);
/// Where so much is left, more of it is granted ahead, bytes and files.
pub const MUCH: Room = Room::new(256 << 20, 1 << 20);
/// A client that has less free than this asks ahead, if it may hope for more.
pub const LOW: Room = Room::new(4 << 20, 256);
/// The same where the server has plenty.
pub const LOW_AMPLE: Room = Room::new(2 * AMPLE_LEN, 4096);
/// How long others are waited for that give back room, and own changes that make some.
pub const RECALL_MAX: Duration = Duration::from_secs(3);
/// A client that is asked for room ships what it has for so long, before it answers.
pub const GIVE_BACK_MAX: Duration = Duration::from_secs(2);
/// So long after a refusal nobody asks again, unless own changes have arrived since.
pub const REFUSED: Duration = Duration::from_millis(250);
/// What became free is told so long after, if nothing else is said.
pub const TELL_AFTER: Duration = Duration::from_secs(1);
/// Most that a client keeps when it says farewell, so that it may begin without the server.
pub const KEEP_FREE: Room = Room::new(64 << 20, 4096);
/// What is granted is kept so long for a client that is away.
pub const KEEP_GRANT: Duration = Duration::from_secs(7 * 24 * 3600);

/// What is granted ahead of the need, when `left` is left after it: a part of that, so that it is
/// much while there is much, and next to nothing when it is nearly all gone. Who needs the rest gets
/// it by having others give back.
pub fn ahead(left: Room) -> Room {
    let part = |left: u64, much: u64, most: u64| match left {
        _ if left >= much => (left / 4).min(most),
        _ => left / 8,
    };
    Room::new(
        part(left.bytes(), MUCH.bytes(), AHEAD_MAX.bytes()),
        part(left.files(), MUCH.files(), AHEAD_MAX.files()),
    )
}

/// What of its free room a client keeps when it says farewell: a part, as the server gave it much
/// only where there was much.
pub fn kept_free(free: Room) -> Room {
    free.part(4).max(LOW).min(KEEP_FREE).min(free)
}

/// Whether there is so much left that a client may hope for an ample grant again and again.
pub fn is_ample(left: Room) -> bool {
    left.bytes() >= 4 * AMPLE_LEN
}

/// Whether what waits in the journal is shipped now: it is old enough, or it is much.
pub fn ship_now(waited: Duration, age: Duration, count: u64, len: u64) -> bool {
    waited >= age || count >= SHIP_COUNT || len >= SHIP_LEN
}

/// How many granules to fetch beyond those that a reader waits for. `before`: what was decided
/// for its last want; `onward`: this one begins where that fetch ended, or at the file's start.
pub fn read_ahead(before: u32, onward: bool) -> u32 {
    if onward { (before * 2).clamp(1, READ_AHEAD_MAX) } else { 0 }
}

/// The pause before attempt number `fails + 1` since the last success: doubled each time, and
/// between half and the whole of it by `chance`, so that clients do not come back in step.
pub fn retry_after(fails: u32, chance: u64) -> Duration {
    let whole = RETRY_MIN.saturating_mul(1 << fails.min(12)).min(RETRY_MAX);
    let half_us = (whole.as_micros() / 2) as u64;
    Duration::from_micros(half_us + chance % (half_us + 1)).max(RETRY_MIN)
}

/// How long a client trusts what it may do after it last heard of its server, which waits longer.
pub fn lease(timeout: Duration) -> Duration {
    timeout.min(TIMEOUT) * 4 / 5
}

/// How long after the connection was lost it is known that the server is away. A server that was
/// silent for its [`lease`], and one to which the network has no way, is away at once.
pub fn away_after(timeout: Duration) -> Duration {
    timeout.min(RETURN)
}

/// How long a server is waited for that is there, but does not answer: others may have to let go
/// first, and to ship what they have changed.
pub fn patience(timeout: Duration) -> Duration {
    timeout * 3
}

/// What a client may do with the volume when it comes: as much as nobody minds. `alone`: nobody
/// else may do anything; `written`: somebody may change something; `clients`: all there are.
pub fn first_right(alone: bool, written: bool, clients: usize) -> Mode {
    match (alone, written) {
        (true, _) => Mode::Write,
        (false, false) if clients <= READ_ALL_CLIENTS_MAX => Mode::Read,
        _ => Mode::None,
    }
}

/// Whether clean data are evicted to keep a limit. Away from the server they could not be fetched
/// again: then they stay, and only what is written can make the cache grow.
pub fn may_evict(online: bool) -> bool {
    online
}

/// How long after a look at what is pinned, which took so long, the next one may come: a tenth of the
/// time is spent with it at most.
pub fn pin_rest(took: Duration) -> Duration {
    (took * 9).clamp(PIN_REST_MIN, PIN_REST_MAX)
}

/// The pause that follows the fetch of `len` bytes of what is pinned, in the background.
pub fn pin_pause(len: u64) -> Duration {
    let bytes = Duration::from_micros(len.saturating_mul(1_000_000) / PIN_RATE);
    bytes.max(Duration::from_secs(1) / PIN_ASKS)
}

/// How long shipping rests after the server could not take a batch. Not for long: when its disk was
/// full and has room again, somebody waits for that.
pub fn reship_after(fails: u32) -> Duration {
    Duration::from_secs(1 << fails.min(3))
}

/// Whether an object may be answered from the cache. `current`: no promise for it was broken and
/// it is of the cache's epoch; `ours`: its newest state is a change of our own that the server
/// does not have yet. Away from the server the cache is the best there is.
pub fn answers(current: bool, ours: bool, online: bool) -> bool {
    current || ours || !online
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_grow_and_stay_bounded() {
        assert_eq!(retry_after(0, 7), RETRY_MIN);
        for fails in 1..40 {
            for chance in [0, 1, u64::MAX / 3, u64::MAX] {
                let pause = retry_after(fails, chance);
                assert!(pause >= RETRY_MIN && pause <= RETRY_MAX, "{fails}: {pause:?}");
            }
        }
        assert_eq!(retry_after(30, 0), RETRY_MAX / 2);
        assert_ne!(retry_after(9, 1), retry_after(9, 4_000_000));
    }

    #[test]
    fn what_is_pinned_takes_its_share_and_no_more() {
        let second = Duration::from_secs(1);
        assert_eq!(pin_pause(PIN_RATE * 3), second * 3);
        assert_eq!(pin_pause(0) * PIN_ASKS, second);
        assert_eq!(pin_rest(Duration::ZERO), PIN_REST_MIN);
        assert_eq!(pin_rest(second * 10), second * 90);
        assert_eq!(pin_rest(second * 100_000), PIN_REST_MAX);
    }

    #[test]
    fn a_server_that_is_away_is_known_soon() {
        assert_eq!(away_after(Duration::from_secs(600)), RETURN);
        assert_eq!(away_after(Duration::from_secs(1)), Duration::from_secs(1));
    }

    #[test]
    fn reading_onward_widens_the_window() {
        let mut ahead = 0;
        let seen: Vec<u32> = (0..5)
            .map(|_| {
                ahead = read_ahead(ahead, true);
                ahead
            })
            .collect();
        assert_eq!(seen, [1, 2, 4, 4, 4]);
        assert_eq!(read_ahead(4, false), 0);
    }

    #[test]
    fn age_or_amount_ships() {
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        assert!(!ship_now(ms(999), s(1), SHIP_COUNT - 1, SHIP_LEN - 1));
        assert!(ship_now(s(1), s(1), 1, 0));
        assert!(ship_now(ms(0), s(1), SHIP_COUNT, 0));
        assert!(ship_now(ms(0), s(1), 1, SHIP_LEN));
    }
}
