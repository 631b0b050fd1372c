//! A payment service on axum. Whatever its clients, its handler and its bank do, an order is charged once.
//!
//! ```text
//!   clients  -- HTTP over loopback -->  authenticate -> IdempotencyLayer -> pay  -->  the bank, which charges whatever it is told
//! ```
//!
//! The clients retry, send one payment 50 times at once, change the amount and keep the key, or hang up and come back. The
//! handler crashes before or after the charge, or doesn't hear what the bank says. Each charge draws a random receipt number, so
//! a second one would show in the answers: those for one order have to be equal to the byte. In the end the service is closed,
//! a new one opens the same store, and every payment is sent once more.
//!
//! ```text
//! cargo run --features http --example axum_payments [-- DIRECTORY]
//! ```

#[path = "axum_payments/bank.rs"]
mod bank;
#[path = "axum_payments/clients.rs"]
mod clients;

use axum::body::Body;
use axum::extract::{Json, Request, State};
use axum::http::{StatusCode, header, request::Parts};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router, routing::post};
use bank::{Bank, Card, Receipt, Refusal, crash};
use bytes::Bytes;
use clients::{Payment, Till, payments};
use oncekey::http::{
    BoxError, EventKind, IdempotencyLayer, InFlight, Interrupted, Policy, Reconciled, Running, Scope, Verdict,
};
use oncekey::{ErrorKind, Retention, Store};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::{JoinHandle, JoinSet};

type Result<T> = std::result::Result<T, BoxError>;

const PAYMENTS: u64 = 200;

/// Who sends the request: the scope of its key.
#[derive(Clone)]
struct Merchant(String);

#[derive(Clone, Serialize, Deserialize)]
struct Order {
    number: String,
    cents: u64,
    card: Card,
}

fn router(bank: &Arc<Bank>, idempotency: IdempotencyLayer) -> Router {
    Router::new()
        .route("/payments", post(pay))
        .route("/quotes", post(quote))
        .with_state(Arc::clone(bank))
        // The last layer is the outermost: who it is has to be known before whose key it is.
        .layer(idempotency)
        .layer(middleware::from_fn(authenticate))
}

fn idempotency(store: Store, bank: &Arc<Bank>) -> IdempotencyLayer {
    let payments = Policy::new()
        .required(true)
        .in_flight(InFlight::Wait(Duration::from_secs(10)))
        .interrupted(ask_the_bank(Arc::clone(bank)))
        .retention(Retention::For(Duration::from_secs(7 * 24 * 3600)));
    // A quote does no harm if it is made twice, and isn't worth keeping for long.
    let others = Policy::new().interrupted(Interrupted::Rerun).retention(Retention::For(Duration::from_secs(60)));
    let payments = Arc::new(payments);
    IdempotencyLayer::new(
        store,
        Scope::from_request(|parts: &Parts| Some(parts.extensions.get::<Merchant>()?.0.clone())),
    )
    .policy(others)
    .route(move |parts| (parts.uri.path() == "/payments").then(|| Arc::clone(&payments)))
}

async fn authenticate(mut request: Request, next: Next) -> Response {
    // A real service verifies a token here; this one takes the merchant's word.
    let token =
        request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let Some(merchant) = token.map(|token| Merchant(token.to_owned())) else {
        return StatusCode::UNAUTHORIZED.into_response();
    };
    request.extensions_mut().insert(merchant);
    next.run(request).await
}

async fn pay(
    State(bank): State<Arc<Bank>>,
    Extension(merchant): Extension<Merchant>,
    Extension(running): Extension<Running>,
    Json(order): Json<Order>,
) -> Response {
    let is_first_attempt = running.attempt() == 1;
    if order.card == Card::CrashesBefore && is_first_attempt {
        crash();
    }
    // Without it, whoever comes after a crash knows that the bank was never asked.
    if running.set_recovery_point("asked the bank").await.is_err() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let charged = bank.charge(&merchant.0, &order, running.fence()).await;
    if order.card == Card::CrashesAfter && is_first_attempt {
        crash();
    }
    match charged {
        Ok(receipt) => created(&receipt).map(Body::from),
        // Final, and stored as such by default: the same order will be declined again.
        Err(Refusal::Declined) => StatusCode::PAYMENT_REQUIRED.into_response(),
        Err(Refusal::Superseded) => StatusCode::CONFLICT.into_response(),
        Err(Refusal::NoAnswer) => {
            // By default a 5xx means that nothing happened. Here that isn't known.
            running.set_verdict(Verdict::Unknown);
            StatusCode::GATEWAY_TIMEOUT.into_response()
        }
    }
}

/// The answer to a payment, whether the handler or somebody after it gives it.
fn created(receipt: &Receipt) -> axum::http::Response<Bytes> {
    let body = format!("{{\"receipt\":\"{:016x}\",\"cents\":{}}}", receipt.number, receipt.cents);
    let mut response = axum::http::Response::new(Bytes::from(body));
    *response.status_mut() = StatusCode::CREATED;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// Finds out what became of a payment whose handler vanished.
fn ask_the_bank(bank: Arc<Bank>) -> Interrupted {
    Interrupted::reconcile(move |interruption| {
        let bank = Arc::clone(&bank);
        async move {
            if interruption.recovery_point.is_none() {
                return Ok(Reconciled::DidNotHappen);
            }
            let order: Order = serde_json::from_slice(&interruption.body)?;
            Ok(match bank.charges(std::str::from_utf8(&interruption.scope)?, &order.number).first() {
                Some(receipt) => Reconciled::Happened(created(receipt).map(Into::into)),
                None => Reconciled::DidNotHappen,
            })
        }
    })
}

/// What the bank would take for it; with or without a key.
async fn quote(Json(order): Json<Order>) -> String {
    format!("{} cents, quote {:016x}", 25 + order.cents / 100, fastrand::u64(..))
}

/// The service at a free port, until it is closed.
struct Service {
    address: SocketAddr,
    idempotency: IdempotencyLayer,
    close: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
}

type Counts = Arc<Mutex<HashMap<EventKind, u64>>>;

impl Service {
    async fn open(dir: &Path, bank: &Arc<Bank>, counts: &Counts) -> Result<Service> {
        let counts = Arc::clone(counts);
        let idempotency = idempotency(open(dir).await?, bank)
            .observe(move |event| *counts.lock().entry(event.kind).or_default() += 1);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (close, closed) = oneshot::channel();
        let serve = axum::serve(listener, router(bank, idempotency.clone()))
            .with_graceful_shutdown(async { drop(closed.await) });
        Ok(Service { address, idempotency, close, served: tokio::spawn(serve.into_future()) })
    }

    /// Ends when all connections are closed, and all operations done, those of clients that left included.
    async fn close(self) -> Result<()> {
        drop(self.close);
        self.served.await??;
        self.idempotency.drained().await;
        Ok(())
    }
}

/// Opens the store once the service before has let go of it: axum says that a connection is closed a moment before it drops it,
/// and a copy of the router with it.
async fn open(dir: &Path) -> Result<Store> {
    for _ in 0..1000 {
        match Store::open(dir) {
            Err(error) if error.kind() == ErrorKind::Locked => tokio::time::sleep(Duration::from_millis(1)).await,
            opened => return Ok(opened?),
        }
    }
    Err(format!("{} stays locked", dir.display()).into())
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let temporary = tempfile::tempdir()?;
    let dir = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("payments"), PathBuf::from);
    let (bank, counts) = (Arc::new(Bank::default()), Counts::default());
    let payments = payments(PAYMENTS, fastrand::u64(..));

    let service = Service::open(&dir, &bank, &counts).await?;
    let till = Till::new(service.address);
    check_the_other_routes(&till, &payments[0]).await?;
    let at_once = Arc::new(Semaphore::new(8));
    let mut paying = JoinSet::new();
    for (n, payment) in payments.iter().cloned().enumerate() {
        let (till, turn) = (till.clone(), Arc::clone(&at_once).acquire_owned().await?);
        paying.spawn(async move {
            let answers = till.pay(&payment).await;
            drop(turn);
            (n, answers)
        });
    }
    let mut answers = vec![Vec::new(); payments.len()];
    while let Some(paid) = paying.join_next().await {
        let (n, given) = paid?;
        answers[n] = given?;
    }
    drop(till);
    service.close().await?;

    let ran = counts.lock().get(&EventKind::Started).copied();
    let service = Service::open(&dir, &bank, &counts).await?;
    let till = Till::new(service.address);
    for (payment, answers) in payments.iter().zip(&mut answers) {
        answers.push(till.insist(payment).await?);
    }
    drop(till);
    service.close().await?;
    let is_all_replayed = ran == counts.lock().get(&EventKind::Started).copied();

    let (mut charges, mut declined, mut double, mut lost, mut contradicted) = (0, 0, 0, 0, 0);
    for (payment, answers) in payments.iter().zip(&answers) {
        let receipts = bank.charges(payment.merchant, &payment.order.number);
        let is_declined = payment.order.card == Card::Declined;
        charges += receipts.len();
        declined += u32::from(is_declined);
        double += u32::from(receipts.len() > 1);
        lost += u32::from(receipts.is_empty() != is_declined);
        let expected = receipts.first().map_or(Bytes::new(), |receipt| created(receipt).into_body());
        contradicted += u32::from(answers.iter().any(|answer| answer.body != expected || answer != &answers[0]));
    }
    let counts = counts.lock();
    let count = |kind| counts.get(&kind).copied().unwrap_or_default();
    println!(
        "axum_payments: {PAYMENTS} payments, {charges} charges, {declined} declined, {double} double, {lost} lost, {contradicted} contradicted; \
         {} replays, {} mismatches, {} interrupted, {} taken over",
        count(EventKind::Replayed),
        count(EventKind::Mismatched),
        count(EventKind::Unknown),
        count(EventKind::TakenOver),
    );
    let is_good = double == 0 && lost == 0 && contradicted == 0 && is_all_replayed;
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A payment needs a key. A quote doesn't, and is made anew without one.
async fn check_the_other_routes(till: &Till, Payment { merchant, key, order, .. }: &Payment) -> Result<()> {
    let without = till.post("/payments", None, merchant, order).await?;
    let [a, b] =
        [till.post("/quotes", None, merchant, order).await?, till.post("/quotes", None, merchant, order).await?];
    // The same key as the payment's: an operation is a route too.
    let [c, d] = [
        till.post("/quotes", Some(key), merchant, order).await?,
        till.post("/quotes", Some(key), merchant, order).await?,
    ];
    if without.status == StatusCode::BAD_REQUEST && a.body != b.body && c == d && c.status == StatusCode::OK {
        return Ok(());
    }
    Err(format!("unexpected: {without:?}, {a:?}, {b:?}, {c:?}, {d:?}").into())
}
