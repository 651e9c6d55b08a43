//! The volumes of a running server: added, removed, renamed and changed while it serves.
//!
//! Other threads of the process send an [`Order`] by [`Handle::order`] and wait for what came of it,
//! never longer than [`ORDER_TIME_MAX`]. A volume is opened before it is handed to the loop, and
//! closed after the loop has given it back, and the files of one that gets a limit are counted by a
//! thread of their own, so that others are served meanwhile. A volume's place in the list is its
//! number for the machine, and never used again: a removed one leaves a hole.
//! What is ordered is durable in the volume's state before it holds.

use std::ops::{Index, IndexMut};
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};

use super::handle::{Amount, Figures, Handle, Report};
use super::room;
use super::server::Server;
use crate::lento::granting::RoomReport;
use crate::lento::room::Room;
use crate::lento::server::VolumeNo;
use crate::lento::serving::Owing;
use crate::replica::settings::{Change, USERS_MAX};
use crate::replica::state::StateError;
use crate::replica::usage::{CountJob, Counted};
use crate::replica::volume::{self, Volume, VolumeError};
use crate::sys::Errno;

/// Longest wait for clients to hand in what they changed, before a volume is read-only: longer than
/// the lease of one that was just cut off.
const FREEZE_MAX: Duration = Duration::from_secs(15);
/// Longest wait for an order to be carried out.
const ORDER_TIME_MAX: Duration = Duration::from_secs(20);
/// Longest wait for a report that is of now.
const LOOK_TIME_MAX: Duration = Duration::from_secs(1);
/// Clients that an error names.
const NAMED_MAX: usize = 8;

/// What is to be done with a volume.
pub enum Order {
    /// nothing: the report is as of now then
    Look,
    /// serve one more
    Add(Box<Volume>),
    /// serve it no more; `force`: whoever is connected, or has changes that are not here
    Remove { name: String, force: bool },
    /// call it otherwise
    Rename { name: String, to: String },
    /// `force`: read-only though clients have changes, or a limit below what is taken
    Change { name: String, change: Change, force: bool },
}

/// What came of it.
pub enum Done {
    Done,
    /// to be closed by who gave the order
    Removed(Box<Volume>),
}

#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    #[error("there is no volume {name}; there are: {}", there.join(", "))]
    Unknown { name: String, there: Vec<String> },
    #[error("there is a volume {name} already")]
    Taken { name: String },
    #[error("{name}: something is being done with it already; try again when that has ended")]
    Underway { name: String },
    #[error("{name} is in use: {}", clients.join(", "))]
    InUse { name: String, clients: Vec<String> },
    #[error("{name}: not all changes of its clients are here: {}", clients.join(", "))]
    Owing { name: String, clients: Vec<String> },
    #[error("{name}: {taken} {of} are taken or promised already, the limit would be {limit}")]
    TooSmall { name: String, of: &'static str, taken: u64, limit: u64 },
    #[error("{name}: at most {USERS_MAX} users can have limits of their own")]
    TooManyUsers { name: String },
    #[error("{0}")]
    State(#[from] StateError),
    #[error("the server is stopping")]
    Stopping,
    #[error("the server did not do it in {} s; it may still", ORDER_TIME_MAX.as_secs())]
    Late,
}

type Told = Sender<Result<Done, OrderError>>;

/// An order on its way to the loop.
pub(super) struct Ordered(Order, Told);

/// What waits for clients, or for the disk.
pub(super) enum Waiting {
    /// to become read-only
    Freeze { no: VolumeNo, change: Change, told: Told },
    /// for the end of the sync that is under way
    Leave { no: VolumeNo, told: Told },
    /// until a new limit holds
    Count { no: VolumeNo, told: Told },
}

impl Handle {
    /// Has the loop carry out an order.
    ///
    /// # Errors
    /// [`OrderError`]; but for `Late` and `Stopping`, nothing has changed then.
    pub fn order(&self, order: Order) -> Result<Done, OrderError> {
        self.order_within(order, ORDER_TIME_MAX)
    }
    /// How the server is doing now; after [`LOOK_TIME_MAX`] what is known.
    pub fn report_now(&self) -> Report {
        if let Err(e) = self.order_within(Order::Look, LOOK_TIME_MAX) {
            log::debug!("a report of some time ago: {e}");
        }
        self.report()
    }
    fn order_within(&self, order: Order, time_max: Duration) -> Result<Done, OrderError> {
        let (told, answer) = bounded(1);
        self.shared.push_order(Ordered(order, told));
        self.waker.wake();
        match answer.recv_timeout(time_max) {
            Ok(done) => done,
            Err(e) if e.is_timeout() => Err(OrderError::Late),
            Err(_) => Err(OrderError::Stopping),
        }
    }
}

/// The volumes by their numbers, with holes.
#[derive(Default)]
pub(super) struct Served(Vec<Option<Volume>>);

impl Served {
    pub(super) fn push(&mut self, volume: Volume) {
        self.0.push(Some(volume));
    }
    pub(super) fn get_mut(&mut self, no: VolumeNo) -> Option<&mut Volume> {
        self.0.get_mut(no).and_then(Option::as_mut)
    }
    pub(super) fn is_hole(&self, no: VolumeNo) -> bool {
        self.0.get(no).is_none_or(Option::is_none)
    }
    pub(super) fn iter(&self) -> impl Iterator<Item = (VolumeNo, &Volume)> {
        self.0.iter().enumerate().filter_map(|(no, volume)| Some((no, volume.as_ref()?)))
    }
    pub(super) fn into_volumes(self) -> impl Iterator<Item = Volume> {
        self.0.into_iter().flatten()
    }
    fn take(&mut self, no: VolumeNo) -> Option<Volume> {
        self.0.get_mut(no).and_then(Option::take)
    }
    fn find(&self, name: &str) -> Result<VolumeNo, OrderError> {
        let found = self.iter().find(|(_, volume)| volume.name() == name);
        found.map(|(no, _)| no).ok_or_else(|| OrderError::Unknown {
            name: name.to_owned(),
            there: self.iter().map(|(_, volume)| volume.name().to_owned()).collect(),
        })
    }
}

/// For numbers that are no holes: the loop passes over effects for others.
#[allow(clippy::expect_used)] // a broken invariant
impl Index<VolumeNo> for Served {
    type Output = Volume;
    fn index(&self, no: VolumeNo) -> &Volume {
        self.0[no].as_ref().expect("no effect is carried out for a hole")
    }
}

#[allow(clippy::expect_used)] // a broken invariant
impl IndexMut<VolumeNo> for Served {
    fn index_mut(&mut self, no: VolumeNo) -> &mut Volume {
        self.0[no].as_mut().expect("no effect is carried out for a hole")
    }
}

impl Server {
    /// Serves one more volume.
    ///
    /// # Errors
    /// Another one has its name; it comes back, to be closed.
    pub fn serve(&mut self, volume: Volume) -> Result<VolumeNo, (OrderError, Box<Volume>)> {
        if self.volumes.find(volume.name()).is_ok() {
            let name = volume.name().to_owned();
            return Err((OrderError::Taken { name }, Box::new(volume)));
        }
        let no = self.machine.add_volume(volume.name(), volume.id(), volume.stamp());
        let settings = volume.settings();
        self.machine.set_terms(no, settings.read_only, settings.former());
        self.machine.expect_back(no, &volume.live(), Instant::now());
        self.machine.on_conflicts(no, volume.conflicts());
        self.machine.reserve(volume.disk(), room::saved(&volume), Instant::now());
        self.volumes.push(volume);
        if let Some(job) = self.limits_changed(no) {
            self.on_counted(no, job.run()); // of one that was not counted before
        }
        Ok(no)
    }
    /// Names and directories of the volumes.
    pub fn served(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.volumes.iter().map(|(_, volume)| (volume.name(), volume.path()))
    }
    /// Called with every volume that comes, and whenever the limits in its settings change. `Some`:
    /// a limit holds when it is counted what the files take.
    fn limits_changed(&mut self, no: VolumeNo) -> Option<CountJob> {
        let volume = &mut self.volumes[no];
        let limit = room::limit(volume.settings().quota);
        match volume.count_usage(limit.is_some()) {
            Ok(None) if volume.is_counting() => return None,
            Ok(None) => self.machine.set_quota(no, limit),
            Ok(Some(job)) => return Some(job),
            Err(e) => not_counted(volume, &e),
        }
        None
    }
    /// What the files of a volume take is known, or cannot be.
    pub(super) fn on_counted(&mut self, no: VolumeNo, walked: volume::Result<Counted>) {
        let Some(volume) = self.volumes.get_mut(no) else { return };
        match volume.counted(walked) {
            // the limit may have gone meanwhile: that needs no count
            Ok(()) => _ = self.limits_changed(no),
            Err(e) => not_counted(volume, &e),
        }
    }
    /// A large tree takes a while.
    fn count(&self, no: VolumeNo, job: CountJob) {
        let (done, waker) = (self.count_done.clone(), self.poll.waker());
        let run = move || {
            if done.send((no, job.run())).is_ok() {
                waker.wake();
            }
        };
        if let Err(e) = std::thread::Builder::new().name("counter".into()).spawn(run) {
            let failed = Errno::from_io_error(&e).unwrap_or(Errno::AGAIN);
            let _ = self.count_done.send((no, Err(failed.into()))); // the loop has the other end
        }
    }
    /// Looks at all disks: what df and status show is of now, whether or not anybody asks for room.
    pub(super) fn survey(&mut self, now: Instant) {
        for (no, volume) in self.volumes.iter() {
            let (free, used) = room::survey(volume);
            self.machine.on_surveyed(no, free, used, now);
        }
    }
    /// How a volume's room is shared out.
    pub(super) fn room(&self, no: VolumeNo) -> Option<RoomReport> {
        // what its files take as of now, not of the last survey
        let report = self.machine.room_report(no)?;
        Some(RoomReport { used: room::used(&self.volumes[no]), ..report })
    }
    /// What is known of a volume's room.
    pub(super) fn figures(&self, no: VolumeNo) -> Figures {
        let Some(report) = self.room(no) else { return Figures::default() };
        let amount = |room: Room| Amount { bytes: room.bytes(), files: room.files() };
        let used = report.quota.is_some().then(|| amount(report.used));
        let disk = report.available.plus(report.granted);
        let capacity = report.quota.map_or(disk, |quota| quota.min(disk.plus(report.used)));
        let (granted, capacity) = (Some(amount(report.granted)), Some(amount(capacity)));
        Figures { used, granted, capacity }
    }

    /// Carries out what was ordered, and ends what waited.
    pub(super) fn take_orders(&mut self, now: Instant) -> bool {
        let orders = self.shared.take_orders();
        let any = !orders.is_empty() || !self.waiting.is_empty();
        for Ordered(order, told) in orders {
            match order {
                Order::Look => {
                    self.survey(now);
                    self.report();
                    tell(&told, Ok(Done::Done));
                }
                Order::Add(volume) => {
                    let added = self.serve(*volume).map(|no| self.say_added(no));
                    let done = added.map_err(|(e, volume)| {
                        close(*volume);
                        e
                    });
                    tell(&told, done.map(|()| Done::Done));
                }
                Order::Rename { name, to } => tell(&told, self.rename(&name, &to)),
                Order::Change { name, change, force } => {
                    self.change(&name, change, force, &told, now);
                }
                Order::Remove { name, force } => match self.remove(&name, force, now) {
                    Ok(no) => self.waiting.push(Waiting::Leave { no, told }),
                    Err(e) => tell(&told, Err(e)),
                },
            }
            self.drain(now);
        }
        for waiting in std::mem::take(&mut self.waiting) {
            if let Some(waiting) = self.look_at(waiting, now) {
                self.waiting.push(waiting);
            }
            self.drain(now);
        }
        any
    }
    /// When what waits is over at the latest.
    pub(super) fn orders_wake_at(&self) -> Option<Instant> {
        let of = |waiting: &Waiting| match waiting {
            Waiting::Freeze { no, .. } => self.machine.freeze_until(*no),
            Waiting::Leave { .. } | Waiting::Count { .. } => None, // another thread wakes the loop
        };
        self.waiting.iter().filter_map(of).min()
    }
    fn look_at(&mut self, waiting: Waiting, now: Instant) -> Option<Waiting> {
        match waiting {
            Waiting::Freeze { no, change, told } => match self.machine.poll_freeze(no, now) {
                None if self.machine.freeze_until(no).is_some() => {
                    return Some(Waiting::Freeze { no, change, told });
                }
                None => tell(&told, Err(OrderError::Stopping)), // the volume was removed meanwhile
                Some(Ok(())) => {
                    let done = self.keep(no, &change);
                    if done.is_err() {
                        self.machine.set_read_only(no, false, now);
                    }
                    self.tell_when_counted(no, told, done);
                }
                Some(Err(owing)) => {
                    let name = self.volumes[no].name().to_owned();
                    let clients = named(owing.iter().map(owing_text));
                    tell(&told, Err(OrderError::Owing { name, clients }));
                }
            },
            Waiting::Count { no, told } => match self.volumes.get_mut(no) {
                Some(volume) if volume.is_counting() => return Some(Waiting::Count { no, told }),
                Some(_) => tell(&told, Ok(Done::Done)),
                None => tell(&told, Err(OrderError::Stopping)),
            },
            Waiting::Leave { no, told } if self.machine.is_syncing(no) => {
                return Some(Waiting::Leave { no, told });
            }
            Waiting::Leave { no, told } => {
                let gone = self.volumes.take(no).map(Box::new);
                tell(&told, gone.map(Done::Removed).ok_or(OrderError::Stopping));
            }
        }
        None
    }

    fn say_added(&self, no: VolumeNo) {
        let volume = &self.volumes[no];
        log::info!("serving {} as /{}", volume.path().display(), volume.name());
    }
    fn rename(&mut self, name: &str, to: &str) -> Result<Done, OrderError> {
        let no = self.volumes.find(name)?;
        if self.volumes.find(to).is_ok() {
            return Err(OrderError::Taken { name: to.to_owned() });
        }
        self.volumes[no].set_name(to)?;
        let settings = self.volumes[no].settings();
        self.machine.rename_volume(no, to, settings.former());
        Ok(Done::Done)
    }
    fn change(&mut self, name: &str, change: Change, force: bool, told: &Told, now: Instant) {
        let checked = self.check_change(name, &change, force);
        let (no, before) = match checked {
            Ok(no) => (no, self.machine.is_read_only(no)),
            Err(e) => return tell(told, Err(e)),
        };
        if change.read_only == Some(true) && !before {
            self.machine.begin_freeze(no, now + FREEZE_MAX, force, now);
            let told = told.clone();
            return self.waiting.push(Waiting::Freeze { no, change, told });
        }
        let done = self.keep(no, &change);
        if done.is_ok() && change.read_only == Some(false) && before {
            self.machine.set_read_only(no, false, now);
        }
        self.tell_when_counted(no, told.clone(), done);
    }
    fn tell_when_counted(&mut self, no: VolumeNo, told: Told, done: Result<Done, OrderError>) {
        match done.is_ok() && self.volumes[no].is_counting() {
            true => self.waiting.push(Waiting::Count { no, told }),
            false => tell(&told, done),
        }
    }
    fn check_change(
        &self,
        name: &str,
        change: &Change,
        force: bool,
    ) -> Result<VolumeNo, OrderError> {
        let no = self.volumes.find(name)?;
        let name = || name.to_owned();
        if self.machine.freeze_until(no).is_some() {
            return Err(OrderError::Underway { name: name() });
        }
        let before = self.volumes[no].settings();
        let after = change.apply(&before);
        if after.users.len() > USERS_MAX {
            return Err(OrderError::TooManyUsers { name: name() });
        }
        let Figures { used, granted, .. } = self.figures(no);
        let (used, granted) = (used.unwrap_or_default(), granted.unwrap_or_default());
        let (was, is) = (before.quota, after.quota);
        for (of, was, is, taken) in [
            ("bytes", was.bytes, is.bytes, used.bytes.saturating_add(granted.bytes)),
            ("files", was.files, is.files, used.files.saturating_add(granted.files)),
        ] {
            let Some(limit) = is.filter(|limit| was != Some(*limit) && *limit < taken) else {
                continue;
            };
            if !force {
                return Err(OrderError::TooSmall { name: name(), of, taken, limit });
            }
        }
        Ok(no)
    }
    /// Durable on return: yes.
    fn keep(&mut self, no: VolumeNo, change: &Change) -> Result<Done, OrderError> {
        self.volumes[no].change_settings(change)?;
        if let Some(job) = self.limits_changed(no) {
            self.count(no, job);
        }
        Ok(Done::Done)
    }
    /// Its clients are gone on return.
    fn remove(&mut self, name: &str, force: bool, now: Instant) -> Result<VolumeNo, OrderError> {
        let no = self.volumes.find(name)?;
        let here = self.machine.clients().into_iter().filter(|client| client.volume == no);
        let here: Vec<String> = here
            .map(|client| format!("{} (node {}) is connected", client.host, client.node))
            .collect();
        let away = self.machine.owing(no).into_iter().filter(|owing| !owing.connected);
        let clients = here.into_iter().chain(away.map(|owing| owing_text(&owing)));
        let mut clients = clients.peekable();
        if !force && clients.peek().is_some() {
            let clients = named(clients);
            return Err(OrderError::InUse { name: name.to_owned(), clients });
        }
        self.machine.remove_volume(no, now);
        Ok(no)
    }
}

fn owing_text(owing: &Owing) -> String {
    let Owing { node, host, records, connected } = owing;
    let away = if *connected { "" } else { ", which is away," };
    match records {
        0 => format!("{host} (node {node}){away} may have changes"),
        _ => format!("{host} (node {node}){away} has up to {records} changes"),
    }
}

fn not_counted(volume: &Volume, e: &VolumeError) {
    let name = volume.name();
    log::error!("{name}: what its files take cannot be counted, no limit holds: {e}");
}

/// The first few of them.
fn named(mut texts: impl Iterator<Item = String>) -> Vec<String> {
    let mut some: Vec<String> = texts.by_ref().take(NAMED_MAX).collect();
    match texts.count() {
        0 => {}
        more => some.push(format!("and {more} more")),
    }
    some
}

/// Who ordered it may have given up; a volume that nobody takes is closed here.
fn tell(told: &Told, done: Result<Done, OrderError>) {
    if let Err(returned) = told.send(done)
        && let Ok(Done::Removed(volume)) = returned.into_inner()
    {
        close(*volume);
    }
}

fn close(volume: Volume) {
    let name = volume.name().to_owned();
    if let Err(e) = volume.close() {
        log::error!("{name}: is not closed cleanly: {e}");
    }
}
