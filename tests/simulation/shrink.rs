//! What is told of a history that fails: the shortest story that was found.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::plan::Plan;
use crate::world::World;

/// Histories that shrinking may run, and how long it may take.
const RUNS_MAX: u32 = 2000;
const TIME_MAX: Duration = Duration::from_secs(60);
/// Lines of a story that are printed, the last ones.
const LINES_MAX: usize = 2500;

pub enum Ended {
    Well { events: u64 },
    Badly(String),
}

pub fn run(plan: &Plan) -> Ended {
    let mut world = World::new(plan, false);
    // what panics in there fails the history, and shrinks as well
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    match ended {
        Ok(Ok(())) => Ended::Well { events: world.events },
        Ok(Err(why)) => Ended::Badly(why),
        Err(_) => Ended::Badly("a panic".to_owned()),
    }
}

/// What went wrong, without whom and where it met.
fn kind(why: &str) -> String {
    why.chars().filter(|c| c.is_alphabetic()).take(16).collect()
}

/// Leaves out steps as long as it still fails in the same way.
pub fn shrink(plan: &Plan, why: &str) -> Plan {
    let (mut plan, mut runs) = (plan.clone(), 0);
    let (mut chunk, until) = (plan.steps.len().div_ceil(2), Instant::now() + TIME_MAX);
    let goes_on = |runs: u32| runs < RUNS_MAX && Instant::now() < until;
    while chunk > 0 && goes_on(runs) {
        let (mut at, mut any) = (0, false);
        while at < plan.steps.len() && goes_on(runs) {
            let mut less = plan.clone();
            let end = (at + chunk).min(less.steps.len());
            less.steps.drain(at..end);
            runs += 1;
            if matches!(run(&less), Ended::Badly(other) if kind(&other) == kind(why)) {
                (plan, any) = (less, true);
            } else {
                at += chunk;
            }
        }
        if chunk == 1 && !any {
            break;
        }
        chunk = (chunk / 2).max(usize::from(any || chunk > 1));
    }
    plan
}

/// Ends the test with the story of a plan that fails.
pub fn fails(plan: &Plan, why: &str) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ())); // a panic that is looked for again and again
    let less = shrink(plan, why);
    std::panic::set_hook(hook);
    let mut world = World::new(&less, true);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    let story = world.ctx.story.take().unwrap_or_default();
    println!("seed {} fails: {why}", plan.seed);
    println!("seed {} fails; its shortest story has {} steps:", plan.seed, less.steps.len());
    for step in &less.steps {
        println!("    {step},");
    }
    println!("with {:?}, {} clients", less.setup, less.clients);
    for line in &story[story.len().saturating_sub(LINES_MAX)..] {
        println!("{}", line.chars().take(700).collect::<String>());
    }
    let why = match ended {
        Ok(Err(why)) => why,
        Ok(Ok(())) => "nothing, this time: the history is not the same for ever".to_owned(),
        Err(_) => "a panic, see above".to_owned(),
    };
    panic!("seed {}: {why}", plan.seed);
}
