//! Parse, dispatch, print the error chain, exit with its code.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use imz::cli::{Cli, Command, KmlCommand, MountHelper};
use imz::modes;
use log::{LevelFilter, Log, Metadata, Record};

fn main() -> ExitCode {
    let typed: Vec<OsString> = std::env::args_os().collect();
    let called = typed.first().map(Path::new).and_then(Path::file_name);
    let (verbose, command) = if called == Some(OsStr::new("mount.imz")) {
        let helper = MountHelper::parse_from(typed);
        let (verbose, fake) = (helper.verbose, helper.fake);
        match helper.into_args() {
            Ok(_) if fake => return ExitCode::SUCCESS,
            Ok(args) => (verbose, Command::Mount(args)),
            Err(why) => {
                let kind = clap::error::ErrorKind::InvalidValue;
                MountHelper::command().error(kind, format!("-o: {why}")).exit()
            }
        }
    } else {
        let is_fsck = typed.iter().skip(1).find(|it| !it.as_encoded_bytes().starts_with(b"-"))
            == Some(&OsString::from("fsck"));
        match Cli::try_parse_from(typed) {
            Ok(cli) => (cli.verbose, cli.command),
            // fsck has the exit codes of its kind
            Err(why) if is_fsck && why.use_stderr() => {
                let _ = why.print(); // nowhere to report a failure
                return ExitCode::from(modes::fsck::USAGE);
            }
            Err(why) => why.exit(),
        }
    };
    start_log(verbose);
    let name = command.name();
    match run(&command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // a closed standard error is no reason to panic
            let _ = writeln!(std::io::stderr(), "imz: {name}: {error:#}");
            ExitCode::from(modes::exit_code(&error))
        }
    }
}

fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => modes::serve::run(args),
        Command::Mount(args) => modes::mount::run(args),
        Command::Umount(args) => modes::umount::run(args),
        Command::Sync(args) => modes::sync::run(args),
        Command::Status(args) => modes::status::run(args),
        Command::Pin(args) => modes::pin::run(args),
        Command::Unpin(args) => modes::unpin::run(args),
        Command::Evict(args) => modes::evict::run(args),
        Command::Conflicts(args) => modes::conflicts::run(args),
        Command::Volume(args) => modes::volume::run(args),
        Command::Replay(args) => modes::replay::run(args),
        Command::Kml(args) => match &args.command {
            KmlCommand::Dump(args) => modes::kml::run(args),
        },
        Command::Inspect(args) => modes::inspect::run(args),
        Command::Fsck(args) => std::process::exit(modes::fsck::run(args).into()),
    }
}

/// Diagnostics on standard error, one line each; with `-vv` and more also when and from where.
struct Lines;

impl Log for Lines {
    fn enabled(&self, _: &Metadata) -> bool {
        true // the maximum level is set once for all
    }
    fn log(&self, record: &Record) {
        let level = record.level().as_str().to_lowercase();
        let line = if log::max_level() >= LevelFilter::Debug {
            let now = humantime::format_rfc3339_millis(std::time::SystemTime::now());
            format!("imz: {now} {level}: {}: {}\n", record.target(), record.args())
        } else {
            format!("imz: {level}: {}\n", record.args())
        };
        // one write, so that lines of several threads do not mix; nowhere to report a failure
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    fn flush(&self) {}
}

fn start_log(verbose: u8) {
    log::set_max_level(match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    });
    // fails only if there is a logger already, and then that one serves
    let _ = log::set_logger(&Lines);
}
