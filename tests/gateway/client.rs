//! A client that sends what a test says, to the byte, and reads answers as they are framed.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longer than anything takes that isn't stuck.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a gateway.
pub struct Client {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

/// An answer, without its framing.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    /// Whether the body came to its end.
    pub is_whole: bool,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The name of the problem that it tells of.
    pub fn problem(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        let problem: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        assert_eq!(problem["status"], self.status, "{self:?}");
        let kind = problem["type"].as_str().unwrap();
        kind.rsplit(['/', '#', ':']).next().unwrap().to_owned()
    }
}

impl Client {
    pub fn connect(address: SocketAddr) -> Client {
        Client::try_connect(address).unwrap()
    }

    pub fn try_connect(address: SocketAddr) -> io::Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let reader = BufReader::new(stream.try_clone()?);
        Ok(Client { stream, reader })
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).unwrap();
    }

    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref())
    }

    /// Says that nothing more will be sent.
    pub fn finish(&mut self) {
        self.stream.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// Sends a request and reads its answer.
    pub fn ask(&mut self, request: impl AsRef<[u8]>) -> Answer {
        self.send(request);
        self.answer(false)
    }

    /// Reads up to so many bytes as they come; fewer only at the end of the connection.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        // What came before an error is what there is.
        self.reader.by_ref().take(count as u64).read_to_end(&mut bytes).ok();
        bytes
    }

    /// Reads an answer; one to a HEAD request has no body.
    pub fn answer(&mut self, is_head: bool) -> Answer {
        self.try_answer(is_head).expect("an answer")
    }

    pub fn try_answer(&mut self, is_head: bool) -> Option<Answer> {
        let mut answer = self.head()?;
        let has_body = !is_head && answer.status != 204 && answer.status != 304;
        answer.is_whole = !has_body || self.body(&mut answer).is_some();
        Some(answer)
    }

    /// Reads status and headers only.
    pub fn head(&mut self) -> Option<Answer> {
        let line = self.line()?;
        let status = line.split(' ').nth(1)?.parse().ok()?;
        let headers = self.fields()?;
        Some(Answer { status, headers, body: Vec::new(), trailers: Vec::new(), is_whole: false })
    }

    /// Reads one chunk of a chunked body; empty at its end.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let size = usize::from_str_radix(self.line()?.trim(), 16).ok()?;
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk).ok()?;
        if size > 0 {
            self.line()?;
        }
        Some(chunk)
    }

    fn body(&mut self, answer: &mut Answer) -> Option<()> {
        if answer.header("transfer-encoding").is_some() {
            loop {
                let chunk = self.chunk()?;
                if chunk.is_empty() {
                    answer.trailers = self.fields()?;
                    return Some(());
                }
                answer.body.extend(chunk);
            }
        }
        match answer.header("content-length").map(|len| len.parse::<u64>().unwrap()) {
            Some(len) => {
                self.reader.by_ref().take(len).read_to_end(&mut answer.body).ok()?;
                (answer.body.len() as u64 == len).then_some(())
            }
            None => self.reader.read_to_end(&mut answer.body).ok().map(drop),
        }
    }

    /// Whether the other side closes the connection and says nothing more.
    pub fn is_closed(&mut self) -> bool {
        self.rest().is_some_and(|rest| rest.is_empty())
    }

    /// What comes until the other side closes the connection; `None` if it doesn't.
    pub fn rest(&mut self) -> Option<Vec<u8>> {
        let mut rest = Vec::new();
        match self.reader.read_to_end(&mut rest) {
            Ok(_) => Some(rest),
            Err(error) => (error.kind() == io::ErrorKind::ConnectionReset).then_some(rest),
        }
    }

    pub fn line(&mut self) -> Option<String> {
        read_line(&mut self.reader)
    }

    fn fields(&mut self) -> Option<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Some(fields);
            }
            let (name, value) = line.split_once(':')?;
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
}

/// A line without its end, each byte as the character of that number; `None` at the end.
pub fn read_line(from: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    match from.read_until(b'\n', &mut line) {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(line.trim_ascii_end().iter().map(|&byte| char::from(byte)).collect()),
    }
}

/// A POST with a key.
pub fn post(path: &str, key: &str, body: &str) -> String {
    post_with(path, &[("idempotency-key", key)], body)
}

pub fn post_with(path: &str, headers: &[(&str, &str)], body: &str) -> String {
    let mut text = format!("POST {path} HTTP/1.1\r\nhost: shop.example\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    format!("{text}\r\n{body}")
}

pub fn get(path: &str, headers: &[(&str, &str)]) -> String {
    let fields: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{fields}\r\n")
}

/// One request on a connection of its own.
pub fn ask(address: SocketAddr, request: impl AsRef<[u8]>) -> Answer {
    Client::connect(address).ask(request)
}
