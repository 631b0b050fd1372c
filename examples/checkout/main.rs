//! Charges every order exactly once, while the service that does it is killed again and again.
//!
//! ```text
//!   this process                                  the same binary, started as the payment service
//!   8 client threads  -- Unix socket, JSON lines -->  a thread a connection
//!   supervisor        -- SIGKILL, restart ------->      oncekey store    was this order charged, and what came of it?
//!                                                       ledger           the side effect: append + fdatasync
//! ```
//!
//! Clients retry whenever a connection breaks, hang up without waiting for the answer, send one order from several
//! threads at once, and ask again for orders long done. The service (`service`) puts each order through the store; the
//! ledger (`ledger`) is a file that knows nothing of the store, as a bank wouldn't. A kill that falls between the
//! charge and its recording leaves the order interrupted, and the service looks into the ledger before it does anything.
//!
//! Each charge draws a random receipt number, so an order charged twice would be answered in two ways. Every answer is
//! compared with the first one for its order. In the end the service is killed once more, every order is asked for once
//! more, and ledger, store and answers have to agree.
//!
//! ```text
//! cargo run --example checkout -- --help
//! ```

mod client;
mod ledger;
mod random;
mod service;

use client::Answer;
use indicatif::{ProgressBar, ProgressStyle};
use ledger::{Charge, Entry};
use oncekey::Store;
use random::Random;
use service::How;
use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, atomic::AtomicUsize};
use std::time::Duration;
use std::{env, fs, process, thread};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const SIGKILL: i32 = 9;

#[derive(clap::Parser)]
#[command(about = "Charges every order exactly once, while the service that does it is killed again and again")]
struct Args {
    /// Orders to charge.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    orders: u32,
    /// Client threads.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    clients: u32,
    /// Kills while orders are under way; some are followed by another one while the service starts.
    #[arg(long, default_value_t = 12)]
    kills: u64,
    /// Where to make the temporary directory that holds ledger, store and socket.
    #[arg(long, default_value_os_t = env::temp_dir())]
    dir: PathBuf,
    /// Seed of the orders' and the kills' schedule; random if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// What the store's answers survive; the ledger is synced either way.
    #[arg(long, value_enum, default_value_t = Durability::Synced)]
    durability: Durability,
    /// Seconds after which the run is given up.
    #[arg(long, default_value_t = 120)]
    give_up_after: u64,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(clap::Subcommand)]
enum Role {
    /// Runs the payment service; the example starts it by itself.
    #[command(hide = true)]
    Serve { home: PathBuf, durability: Durability },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Durability {
    /// A power cut.
    Synced,
    /// The death of the process.
    Buffered,
}

fn main() -> ExitCode {
    let args = <Args as clap::Parser>::parse();
    let ended = match &args.role {
        Some(Role::Serve { home, durability }) => service::serve(home, *durability).map(|()| true),
        None => checkout(&args),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("checkout: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The whole run. Returns whether every order was charged exactly once.
fn checkout(args: &Args) -> Result<bool> {
    let seed = args.seed.map_or_else(getrandom::u64, Ok)?;
    let dir = tempfile::Builder::new().prefix("checkout-").tempdir_in(&args.dir)?;
    let home = dir.path().to_owned();
    eprintln!("checkout: --seed {seed}, in {}", home.display());
    watch_over(Duration::from_secs(args.give_up_after), home.clone());
    match run(args, &home, seed) {
        Ok(true) => {
            dir.close()?;
            Ok(true)
        }
        failed => {
            eprintln!("checkout: kept {}", dir.keep().display());
            failed
        }
    }
}

/// Ends the process if it takes too long. The service follows, since it ends with its standard input.
fn watch_over(limit: Duration, home: PathBuf) {
    thread::spawn(move || {
        thread::sleep(limit);
        eprintln!("checkout: gave up after {limit:?}; kept {}", home.display());
        process::exit(1);
    });
}

fn run(args: &Args, home: &Path, seed: u64) -> Result<bool> {
    let mut random = Random::new(seed);
    let mut shop = Shop::open(args, home, random.fork())?;

    // One order in eight is sent two or three times in a row, so that several clients have it at once.
    let mut sends = Vec::new();
    for order in 0..args.orders {
        let copies = if random.one_in(8) { 2 + random.below(2) } else { 1 };
        sends.extend((0..copies).map(|_| order));
    }
    // One kill in each part of the run, and none at its very end, so that all fall under load.
    let part = u64::from(args.orders) * 19 / 20 / args.kills.max(1);
    let kill_at: Vec<u64> = (0..args.kills).map(|kill| kill * part + random.below(part.max(1))).collect();
    shop.take(sends, &kill_at, random.fork())?;

    shop.kill_and_restart()?;
    shop.take((0..args.orders).collect(), &[], random.fork())?;
    shop.close(home)
}

/// The supervisor's side: the service's process, and what its clients were told.
struct Shop {
    service: Service,
    clients: u32,
    random: Random,
    /// The first answer for each order.
    answers: Vec<Option<String>>,
    answered: u64,
    contradicted: Vec<u32>,
    replays: u64,
    interrupted: u64,
    /// How many of the interrupted orders the ledger had.
    charged_before: u64,
    bar: ProgressBar,
}

impl Shop {
    fn open(args: &Args, home: &Path, random: Random) -> Result<Shop> {
        let style = ProgressStyle::with_template("{elapsed:>4} {bar:40} {pos}/{len} orders, {msg}")?;
        Ok(Shop {
            service: Service::start(home, args.durability)?,
            clients: args.clients,
            random,
            answers: vec![None; args.orders as usize],
            answered: 0,
            contradicted: Vec::new(),
            replays: 0,
            interrupted: 0,
            charged_before: 0,
            bar: ProgressBar::new(u64::from(args.orders)).with_style(style),
        })
    }

    /// Has the clients send these orders, and kills the service whenever as many orders as `kill_at` says are answered.
    fn take(&mut self, sends: Vec<u32>, kill_at: &[u64], mut random: Random) -> Result<()> {
        let (answers_in, answers) = mpsc::channel();
        let sends: Arc<[u32]> = sends.into();
        let next = Arc::new(AtomicUsize::new(0));
        for _ in 0..self.clients {
            let client = client::Client::new(service::socket(&self.service.home), random.fork());
            let (sends, next, answers_in) = (Arc::clone(&sends), Arc::clone(&next), answers_in.clone());
            thread::spawn(move || client.run(&sends, &next, &answers_in));
        }
        drop(answers_in);

        let mut kill_at = kill_at.iter().peekable();
        loop {
            match answers.recv_timeout(Duration::from_millis(100)) {
                Ok(answer) => self.note(answer?),
                Err(RecvTimeoutError::Timeout) => self.service.check_it_runs()?,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            while kill_at.next_if(|at| **at <= self.answered).is_some() {
                thread::sleep(Duration::from_micros(self.random.below(3000)));
                self.kill_and_restart()?;
            }
        }
    }

    fn note(&mut self, Answer { order, receipt, how }: Answer) {
        match how {
            How::Charged => {}
            How::Replayed => self.replays += 1,
            How::Reconciled { was_charged } => {
                self.interrupted += 1;
                self.charged_before += u64::from(was_charged);
            }
        }
        match &self.answers[order as usize] {
            Some(first) if *first == receipt => {}
            Some(first) => {
                self.bar.suspend(|| eprintln!("order {order} was answered with {first} and with {receipt}"));
                self.contradicted.push(order);
            }
            None => {
                self.answers[order as usize] = Some(receipt);
                self.answered += 1;
                self.bar.set_position(self.answered);
            }
        }
    }

    /// One time in three the new process is killed as well, at a moment when it may still be recovering.
    fn kill_and_restart(&mut self) -> Result<()> {
        loop {
            self.service.kill()?;
            self.bar.suspend(|| eprintln!("kill {} after {} orders", self.service.kills, self.answered));
            self.bar.set_message(format!("{} kills, {} interrupted", self.service.kills, self.interrupted));
            self.service.restart()?;
            if !self.random.one_in(3) {
                return Ok(());
            }
            thread::sleep(Duration::from_micros(self.random.below(20_000)));
        }
    }

    /// Stops the service and compares ledger, store and answers. Returns whether they agree on one charge an order.
    fn close(mut self, home: &Path) -> Result<bool> {
        self.service.stop()?;
        self.bar.finish_and_clear();
        let store = Store::open(service::store_dir(home))?;
        store.verify()?;

        let entries = ledger::entries(&fs::read(service::ledger_file(home))?)?;
        let mut receipts: HashMap<&Charge, Vec<&Entry>> = HashMap::new();
        for entry in &entries {
            receipts.entry(&entry.charge).or_default().push(entry);
        }
        let mut double = 0;
        let mut lost = 0;
        for (order, answer) in (0..).zip(&self.answers) {
            let charge = client::charge_of(order);
            let charged = receipts.get(&charge).map_or(&[][..], Vec::as_slice);
            let stored = store.get(&service::request_for(&charge, b""))?;
            let agree = answer.as_ref().is_some_and(|answer| {
                let in_ledger = charged.iter().any(|entry| entry.receipt() == *answer);
                in_ledger && stored.is_some_and(|record| record.bytes() == answer.as_bytes())
            });
            double += u32::from(charged.len() > 1);
            lost += u32::from(!agree || self.contradicted.contains(&order));
        }
        let charges = entries.len();
        let Shop { answers, replays, interrupted, charged_before, service, .. } = self;
        eprintln!("checkout: {charged_before} of the {interrupted} interrupted orders were in the ledger already");
        println!(
            "checkout: {} orders, {charges} charges, {replays} replays, {interrupted} interrupted, {} kills, \
             {double} double, {lost} lost",
            answers.len(),
            service.kills,
        );
        Ok(double == 0 && lost == 0 && charges == answers.len())
    }
}

/// The payment service's process.
struct Service {
    home: PathBuf,
    durability: Durability,
    child: Child,
    kills: u32,
}

impl Service {
    fn start(home: &Path, durability: Durability) -> Result<Service> {
        let child = Self::spawn(home, durability)?;
        Ok(Service { home: home.to_owned(), durability, child, kills: 0 })
    }

    fn spawn(home: &Path, durability: Durability) -> Result<Child> {
        let durability = clap::ValueEnum::to_possible_value(&durability).ok_or("a durability without a name")?;
        let mut command = Command::new(env::current_exe()?);
        command.arg("serve").arg(home).arg(durability.get_name());
        Ok(command.stdin(Stdio::piped()).spawn()?)
    }

    fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        if status.signal() != Some(SIGKILL) {
            return Err(format!("the service ended before it was killed: {status}").into());
        }
        self.kills += 1;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.child = Self::spawn(&self.home, self.durability)?;
        Ok(())
    }

    fn check_it_runs(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(format!("the service ended by itself: {status}").into()),
        }
    }

    fn stop(&mut self) -> Result<()> {
        // Closes its standard input first, which ends it.
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the service did not stop well: {status}").into()) }
    }
}
