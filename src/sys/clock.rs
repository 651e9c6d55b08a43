//! The clock of leases and patience: it never jumps, and goes on while the machine sleeps.
//!
//! CLOCK_MONOTONIC, which is what [`Instant::now`] reads, stands still while a machine is suspended:
//! a lease would last through the night. CLOCK_BOOTTIME does not, but a wait with a timeout counts by
//! the former all the same, so there is an [`Alarm`] that rings by the latter, at the latest when
//! the machine wakes up. Neither hears of it when somebody sets the time of day.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// Now, by the clock that counts sleep. Compare it only with what came from here.
pub fn now() -> Instant {
    static BEGAN: OnceLock<(Instant, Duration)> = OnceLock::new();
    let (began, then) = *BEGAN.get_or_init(|| (Instant::now(), since_boot()));
    began + since_boot().saturating_sub(then)
}

/// The same in nanoseconds since a century before the machine started, so that what is older than
/// that has its place, too.
pub fn now_ns() -> u64 {
    const CENTURY_NS: u64 = 100 * 365 * 86400 * 1_000_000_000;
    CENTURY_NS + since_boot().as_nanos() as u64
}

/// How long ago `then` was, of [`now_ns`].
pub fn age_of(then_ns: u64) -> Duration {
    Duration::from_nanos(now_ns().saturating_sub(then_ns))
}

/// Nanoseconds since the Unix epoch, by the clock on the wall: for what outlives the machine's life.
pub fn wall_ns() -> u64 {
    since_epoch().as_nanos() as u64
}

/// How long ago `then` was, of [`wall_ns`]; nothing where the clock was set back.
pub fn since_wall(then_ns: u64) -> Duration {
    since_epoch().saturating_sub(Duration::from_nanos(then_ns))
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO)
}

fn since_boot() -> Duration {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Boottime);
    Duration::new(tv_sec.unsigned_abs(), tv_nsec.unsigned_abs() as u32)
}

/// Something to wait for together with sockets: readable once the time has come.
#[derive(Debug)]
pub struct Alarm {
    fd: OwnedFd,
    rings_at: Option<Instant>,
}

impl Alarm {
    /// # Errors
    /// As timerfd_create(2).
    pub fn new() -> io::Result<Alarm> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Alarm { fd: timerfd_create(TimerfdClockId::Boottime, flags)?, rings_at: None })
    }

    /// Rings after `pause` or sooner: one that rings a little early costs less than to be set anew
    /// before each wait.
    ///
    /// # Errors
    /// As timerfd_settime(2).
    pub fn set(&mut self, pause: Duration) -> io::Result<()> {
        let now = now();
        let at = now + pause;
        if self.rings_at.is_some_and(|set| set > now && set <= at) {
            return Ok(());
        }
        let spec =
            |d: Duration| Timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos().into() };
        // zero would stop it
        let it_value = spec(pause.max(Duration::from_nanos(1)));
        let new = Itimerspec { it_interval: spec(Duration::ZERO), it_value };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &new)?;
        self.rings_at = Some(at);
        Ok(())
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_as_the_other_one_does_while_nobody_sleeps() {
        let (before, other) = (now(), Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let (passed, others) = (now() - before, other.elapsed());
        assert!(passed >= Duration::from_millis(20));
        assert!(passed.abs_diff(others) < Duration::from_millis(500), "{passed:?} {others:?}");
    }

    #[test]
    fn an_alarm_rings_and_a_later_one_leaves_it_alone() {
        let mut alarm = Alarm::new().unwrap();
        alarm.set(Duration::from_millis(30)).unwrap();
        let first = alarm.rings_at;
        alarm.set(Duration::from_secs(3600)).unwrap();
        assert_eq!(alarm.rings_at, first);
        alarm.set(Duration::from_millis(1)).unwrap();
        assert!(alarm.rings_at < first);
        let began = Instant::now();
        let mut count = [0; 8];
        while rustix::io::read(&alarm.fd, &mut count).is_err() {
            assert!(began.elapsed() < Duration::from_secs(10), "it does not ring");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(u64::from_le_bytes(count), 1);
    }
}
