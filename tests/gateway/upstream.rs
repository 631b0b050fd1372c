//! A service behind the gateway that does what a test says, to the byte.

use crate::client::read_line;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

/// A request as the service got it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// How many requests came before it.
    pub number: usize,
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
}

/// What the service does about a request.
pub enum Act {
    /// Sends bytes and keeps the connection.
    Send(Vec<u8>),
    /// Sends bytes and closes the connection, properly.
    SendAndClose(Vec<u8>),
    /// Sends bytes and says no more, until the other side closes.
    SendAndHang(Vec<u8>),
    /// First sends bytes, and does the rest when the gate is open.
    At(Gate, Vec<u8>, Box<Act>),
}

impl Act {
    /// An answer with a length.
    pub fn answer(status: u16, body: &str) -> Act {
        Act::Send(answer(status, &[], body))
    }
}

/// The bytes of an answer.
pub fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} Scripted\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    format!("{text}\r\n{body}").into_bytes()
}

/// Holds the service back until a test opens it.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let mut is_open = self.0.0.lock().unwrap();
        while !*is_open {
            is_open = self.0.1.wait(is_open).unwrap();
        }
    }
}

/// The running service; it ends with the test's process.
pub struct Upstream {
    pub address: SocketAddr,
    seen: Arc<(Mutex<Vec<Seen>>, Condvar)>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

impl Upstream {
    /// A service that asks a function what to do about each request.
    pub fn start(script: impl Fn(&Seen) -> Act + Send + Sync + 'static) -> Upstream {
        Upstream::on("127.0.0.1:0".parse().unwrap(), script)
    }

    /// A service at an address that was free before.
    pub fn on(address: SocketAddr, script: impl Fn(&Seen) -> Act + Send + Sync + 'static) -> Upstream {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let (script, known) = (Arc::new(script), Arc::clone(&seen));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (script, known) = (Arc::clone(&script), Arc::clone(&known));
                std::thread::spawn(move || serve(stream.unwrap(), &*script, &known));
            }
        });
        Upstream { address, seen }
    }

    /// A service that numbers its answers: 201, `made N`.
    pub fn counting() -> Upstream {
        Upstream::start(|seen| Act::answer(201, &format!("made {}", seen.number)))
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.0.lock().unwrap().clone()
    }

    /// Waits until so many requests have come.
    pub fn wait_for(&self, requests: usize) -> Vec<Seen> {
        let seen = self.seen.0.lock().unwrap();
        self.seen.1.wait_while(seen, |seen| seen.len() < requests).unwrap().clone()
    }
}

fn serve(stream: TcpStream, script: &dyn Fn(&Seen) -> Act, known: &(Mutex<Vec<Seen>>, Condvar)) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(mut seen) = read(&mut reader) {
        {
            let mut all = known.0.lock().unwrap();
            seen.number = all.len();
            all.push(seen.clone());
            known.1.notify_all();
        }
        if !act(script(&seen), &stream) {
            return;
        }
    }
}

/// Whether the connection goes on.
fn act(act_now: Act, mut stream: &TcpStream) -> bool {
    match act_now {
        Act::Send(bytes) => stream.write_all(&bytes).is_ok(),
        Act::SendAndClose(bytes) => {
            stream.write_all(&bytes).ok();
            false
        }
        Act::SendAndHang(bytes) => {
            stream.write_all(&bytes).ok();
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).ok();
            false
        }
        Act::At(gate, first, then) => {
            stream.write_all(&first).ok();
            gate.pass();
            act(*then, stream)
        }
    }
}

fn read(reader: &mut impl BufRead) -> Option<Seen> {
    let line = read_line(reader)?;
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers = read_fields(reader)?;
    let mut seen = Seen { number: 0, method, target, headers, body: Vec::new(), trailers: Vec::new() };
    if seen.header("transfer-encoding").is_some() {
        loop {
            let size = usize::from_str_radix(read_line(reader)?.split(';').next()?.trim(), 16).ok()?;
            if size == 0 {
                break;
            }
            let start = seen.body.len();
            seen.body.resize(start + size, 0);
            reader.read_exact(&mut seen.body[start..]).ok()?;
            read_line(reader)?;
        }
        seen.trailers = read_fields(reader)?;
    } else if let Some(len) = seen.header("content-length") {
        seen.body = vec![0; len.parse().ok()?];
        reader.read_exact(&mut seen.body).ok()?;
    }
    Some(seen)
}

fn read_fields(reader: &mut impl BufRead) -> Option<Vec<(String, String)>> {
    let mut fields = Vec::new();
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            return Some(fields);
        }
        let (name, value) = line.split_once(':')?;
        fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}
