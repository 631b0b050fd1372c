//! A client that doesn't give up, and doesn't behave either.

use crate::Result;
use crate::ledger::Charge;
use crate::random::Random;
use crate::service::{How, Reply};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

/// What a client was told about an order.
pub struct Answer {
    pub order: u32,
    pub receipt: String,
    pub how: How,
}

/// Merchants number their orders independently of one another.
pub fn charge_of(order: u32) -> Charge {
    const MERCHANTS: [&str; 4] = ["acme", "globex", "initech", "umbrella"];
    Charge {
        merchant: MERCHANTS[order as usize % MERCHANTS.len()].to_owned(),
        order: format!("order-{}", order as usize / MERCHANTS.len()),
        cents: 100 + u64::from(order) * 7919 % 100_000,
    }
}

pub struct Client {
    socket: PathBuf,
    connection: Option<BufReader<UnixStream>>,
    random: Random,
}

impl Client {
    pub fn new(socket: PathBuf, random: Random) -> Client {
        Client { socket, connection: None, random }
    }

    /// Takes orders off the shared list until it is empty, and asks for one it or another client had before now and then.
    pub fn run(mut self, sends: &[u32], next: &AtomicUsize, answers: &Sender<Result<Answer>>) {
        // Relaxed: whoever draws a number has it alone, and the list doesn't change.
        while let Some(order) = sends.get(next.fetch_add(1, Ordering::Relaxed)) {
            let again = self.random.one_in(8).then(|| self.random.below(u64::from(*order) + 1) as u32);
            for order in [*order].into_iter().chain(again) {
                if answers.send(self.ask(order)).is_err() {
                    return;
                }
            }
        }
    }

    /// Asks until there is an answer, whatever happens to the service meanwhile.
    fn ask(&mut self, order: u32) -> Result<Answer> {
        let body = serde_json::to_string(&charge_of(order))? + "\n";
        loop {
            match self.send(&body) {
                Ok(line) => match serde_json::from_str(&line)? {
                    Reply::Receipt { receipt, how } => return Ok(Answer { order, receipt, how }),
                    Reply::Refused(why) => return Err(format!("order {order} was refused: {why}").into()),
                    Reply::Retry => {}
                },
                Err(_) => {
                    // The service is down, or went down, or starts.
                    self.connection = None;
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    /// Sends a line and reads one; an error may mean anything, as ever in a network.
    fn send(&mut self, body: &str) -> io::Result<String> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            closed => closed.insert(BufReader::new(UnixStream::connect(&self.socket)?)),
        };
        connection.get_mut().write_all(body.as_bytes())?;
        if self.random.one_in(64) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the client lost patience"));
        }
        let mut line = String::new();
        connection.read_line(&mut line)?;
        // A service that is killed may leave a part of a line behind.
        if line.ends_with('\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}
