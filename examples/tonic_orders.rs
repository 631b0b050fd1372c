//! A gRPC service on tonic: by the metadata `idempotency-key`, an order is placed once.
//!
//! Clients send one order many times at once, change it and keep the key, forget the key, or run into a deadline of their own and
//! come back. A call that streams passes by the layer, key or no key. What was stored is looked up in the end: a gRPC answer
//! isn't one without its trailers.
//!
//! ```text
//! cargo run --features http --example tonic_orders
//! ```

#[path = "tonic_orders/rpc.rs"]
mod rpc;

use bytes::Bytes;
use http::Method;
use oncekey::Store;
use oncekey::http::{BoxError, IdempotencyLayer, InFlight, Policy, Running, Scope, StoredAnswer, operation_of};
use parking_lot::Mutex;
use rpc::{CANCEL, IMPORT, Order, OrdersClient, OrdersServer, PLACE, Receipt, Summary};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::transport::{Channel, Server, server::TcpIncoming};
use tonic::{Code, Request, Response, Status, Streaming};

type Result<T> = std::result::Result<T, BoxError>;

const ORDERS: u32 = 40;
const DUPLICATES: usize = 20;

// ---- The service ---------------------------------------------------------------------------------------------------------------

fn idempotency(store: Store) -> IdempotencyLayer {
    let place = Policy::new().required(true).in_flight(InFlight::Wait(Duration::from_secs(10)));
    // A duplicate is told `ABORTED` as long as the first one runs.
    let cancel = Arc::new(Policy::new().required(true).in_flight(InFlight::Refuse));
    // The layer would know the stream by its second message; so it doesn't read even the first.
    let import = Arc::new(Policy::new().pass(|_| true));
    IdempotencyLayer::new(store, Scope::single_tenant()).policy(place).route(move |parts| match parts.uri.path() {
        CANCEL => Some(Arc::clone(&cancel)),
        IMPORT => Some(Arc::clone(&import)),
        _ => None,
    })
}

/// Places whatever order it gets; what it is told twice, it does twice.
#[derive(Default)]
struct Warehouse {
    placed: Mutex<HashMap<String, u32>>,
    cancelling: Notify,
}

impl Warehouse {
    async fn place(&self, order: Request<Order>) -> std::result::Result<Response<Receipt>, Status> {
        let fence = order.extensions().get::<Running>().map(Running::fence);
        tokio::time::sleep(Duration::from_millis(10)).await;
        *self.placed.lock().entry(order.get_ref().article.clone()).or_default() += 1;
        if order.get_ref().pieces == 0 {
            let mut status = Status::invalid_argument("an order of nothing");
            status.metadata_mut().insert("x-ticket", fastrand::u32(..).into());
            return Err(status);
        }
        Ok(Response::new(Receipt { number: fastrand::u64(..), fence: fence.unwrap_or_default() }))
    }

    async fn cancel(&self, _: Request<Order>) -> std::result::Result<Response<Receipt>, Status> {
        self.cancelling.notify_one();
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok(Response::new(Receipt { number: fastrand::u64(..), fence: 0 }))
    }

    async fn import(&self, orders: Request<Streaming<Order>>) -> std::result::Result<Response<Summary>, Status> {
        let mut orders = orders.into_inner();
        let mut placed = 0;
        while let Some(order) = orders.next().await {
            *self.placed.lock().entry(order?.article).or_default() += 1;
            placed += 1;
        }
        Ok(Response::new(Summary { placed }))
    }
}

// ---- The clients ---------------------------------------------------------------------------------------------------------------

fn with_key(key: &str, article: &str, pieces: u32) -> Result<Request<Order>> {
    let mut request = Request::new(Order { article: article.to_owned(), pieces });
    request.metadata_mut().insert("idempotency-key", key.parse()?);
    Ok(request)
}

fn expect<T>(what: &str, code: Code, answer: std::result::Result<Response<T>, Status>) -> Result<Status> {
    match answer {
        Err(status) if status.code() == code => Ok(status),
        Err(status) => Err(format!("{what}: {code:?} was expected, and this came: {status}").into()),
        Ok(_) => Err(format!("{what}: {code:?} was expected, and it succeeded").into()),
    }
}

fn is_replayed(answer: &Response<Receipt>) -> bool {
    answer.metadata().contains_key("idempotency-replayed")
}

/// Places an order by many calls at once. Returns the receipts.
async fn place(orders: &OrdersClient, n: u32) -> Result<Vec<Receipt>> {
    let (key, article) = (format!("order-{n}"), format!("article-{n}"));
    if n.is_multiple_of(4) {
        // The deadline is over in the middle of it. The server ends the call; the operation goes on.
        let mut hurried = with_key(&key, &article, n + 1)?;
        hurried.set_timeout(Duration::from_millis(5));
        expect("in a hurry", Code::Cancelled, orders.place(hurried).await)?;
    }
    let mut duplicates = JoinSet::new();
    for _ in 0..DUPLICATES {
        let (orders, request) = (orders.clone(), with_key(&key, &article, n + 1)?);
        duplicates.spawn(async move { orders.place(request).await });
    }
    let mut receipts = Vec::new();
    for answer in duplicates.join_all().await {
        receipts.push(answer?.into_inner());
    }
    let changed = orders.place(with_key(&key, &article, n + 2)?).await;
    expect("other pieces under the same key", Code::FailedPrecondition, changed)?;
    let again = orders.place(with_key(&key, &article, n + 1)?).await?;
    if !is_replayed(&again) {
        return Err("a late duplicate was not told that its answer is an old one".into());
    }
    receipts.push(again.into_inner());
    Ok(receipts)
}

/// One call has `ABORTED` while the other runs, and its answer afterwards.
async fn cancel_twice_at_once(orders: &OrdersClient, warehouse: &Warehouse) -> Result<()> {
    let (first, request) = (orders.clone(), with_key("cancel-1", "article-1", 1)?);
    let first = tokio::spawn(async move { first.cancel(request).await });
    warehouse.cancelling.notified().await;
    let refused = orders.cancel(with_key("cancel-1", "article-1", 1)?).await;
    let refused = expect("while it runs", Code::Aborted, refused)?;
    if !refused.metadata().contains_key("retry-after") {
        return Err("ABORTED came without the time to wait".into());
    }
    let first = first.await??;
    let again = orders.cancel(with_key("cancel-1", "article-1", 1)?).await?;
    if is_replayed(&first) || !is_replayed(&again) || first.get_ref() != again.get_ref() {
        return Err(format!("a cancellation was answered with {first:?} and with {again:?}").into());
    }
    Ok(())
}

/// A call that failed for good fails again, with the same metadata, and without another try.
async fn fail_twice(orders: &OrdersClient) -> Result<()> {
    let first = orders.place(with_key("nothing", "nothing", 0)?).await;
    let first = expect("nothing", Code::InvalidArgument, first)?;
    let again = orders.place(with_key("nothing", "nothing", 0)?).await;
    let again = expect("nothing", Code::InvalidArgument, again)?;
    let ticket = |status: &Status| status.metadata().get("x-ticket").cloned();
    if ticket(&first).is_none() || ticket(&first) != ticket(&again) || first.message() != again.message() {
        return Err(format!("a failure was answered with {first} and with {again}").into());
    }
    Ok(())
}

async fn import_twice(orders: &OrdersClient) -> Result<()> {
    for _ in 0..2 {
        let each = (0..5).map(|n| Order { article: format!("imported-{n}"), pieces: 1 });
        let mut request = Request::new(tokio_stream::iter(each));
        request.metadata_mut().insert("idempotency-key", "import-1".parse()?);
        let placed = orders.import(request).await?.into_inner().placed;
        if placed != 5 {
            return Err(format!("{placed} of 5 orders were imported").into());
        }
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let dir = tempfile::tempdir()?;
    let store = Store::open(dir.path().join("orders"))?;
    let idempotency = idempotency(store.clone());
    let warehouse = Arc::new(Warehouse::default());
    let incoming = TcpIncoming::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let address = incoming.local_addr()?;
    let server = Server::builder().layer(idempotency.clone()).add_service(OrdersServer::new(Arc::clone(&warehouse)));
    tokio::spawn(server.serve_with_incoming(incoming));

    let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
    let orders = OrdersClient::new(channel);
    let without_key = orders.place(Request::new(Order { article: "nothing".to_owned(), pieces: 1 })).await;
    expect("without a key", Code::InvalidArgument, without_key)?;
    fail_twice(&orders).await?;
    cancel_twice_at_once(&orders, &warehouse).await?;
    import_twice(&orders).await?;
    let mut placing = JoinSet::new();
    for n in 0..ORDERS {
        let orders = orders.clone();
        placing.spawn(async move { (n, place(&orders, n).await) });
    }
    let placed = placing.join_all().await;
    idempotency.drained().await;

    let (mut calls, mut double, mut contradicted, mut without_trailers) = (0, 0, 0, 0);
    for (n, receipts) in placed {
        let receipts = receipts?;
        calls += receipts.len();
        double += u32::from(warehouse.placed.lock().get(&format!("article-{n}")) != Some(&1));
        contradicted += u32::from(receipts.iter().any(|receipt| receipt != &receipts[0]));
        without_trailers += u32::from(!has_trailers(&store, &format!("order-{n}"))?);
    }
    let failed = warehouse.placed.lock().get("nothing").copied().unwrap_or_default();
    let imported = warehouse.placed.lock().get("imported-0").copied().unwrap_or_default();
    println!(
        "tonic_orders: {ORDERS} orders, {calls} receipts, {double} double, {contradicted} contradicted, {without_trailers} without trailers; \
         {failed} try of what fails, {imported} imports that passed"
    );
    let is_good = double == 0 && contradicted == 0 && without_trailers == 0 && failed == 1 && imported == 2;
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether the stored answer ends as a gRPC answer has to.
fn has_trailers(store: &Store, key: &str) -> Result<bool> {
    let operation = operation_of(&Method::POST, PLACE);
    let record = store.get(&oncekey::Request::new(key).operation(&operation))?.ok_or("an order that isn't stored")?;
    let answer = StoredAnswer::decode(Bytes::from_owner(record)).ok_or("something else is stored")?;
    Ok(answer.trailers.is_some_and(|trailers| trailers.get("grpc-status").is_some_and(|status| status == "0")))
}
