//! What tonic's generator makes of
//!
//! ```proto
//! package shop;
//! service Orders {
//!   rpc Place(Order) returns (Receipt);
//!   rpc Cancel(Order) returns (Receipt);
//!   rpc Import(stream Order) returns (Summary);
//! }
//! ```
//!
//! in fewer words, so that building the example needs no `protoc`.

use crate::Warehouse;
use bytes::Bytes;
use http::uri::PathAndQuery;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::{BoxError, Service, service_fn};

pub const PLACE: &str = "/shop.Orders/Place";
pub const CANCEL: &str = "/shop.Orders/Cancel";
pub const IMPORT: &str = "/shop.Orders/Import";

#[derive(Clone, PartialEq, prost::Message)]
pub struct Order {
    #[prost(string, tag = "1")]
    pub article: String,
    #[prost(uint32, tag = "2")]
    pub pieces: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Receipt {
    #[prost(uint64, tag = "1")]
    pub number: u64,
    #[prost(uint64, tag = "2")]
    pub fence: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Summary {
    #[prost(uint32, tag = "1")]
    pub placed: u32,
}

#[derive(Clone)]
pub struct OrdersServer(Arc<Warehouse>);

impl OrdersServer {
    pub fn new(warehouse: Arc<Warehouse>) -> Self {
        OrdersServer(warehouse)
    }
}

impl NamedService for OrdersServer {
    const NAME: &'static str = "shop.Orders";
}

impl<B> Service<http::Request<B>> for OrdersServer
where
    B: http_body::Body<Data = Bytes, Error: Into<BoxError> + Send> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let warehouse = Arc::clone(&self.0);
        Box::pin(async move {
            Ok(match request.uri().path() {
                PLACE => {
                    let act = |order| async { warehouse.place(order).await };
                    Grpc::new(ProstCodec::default()).unary(service_fn(act), request).await
                }
                CANCEL => {
                    let act = |order| async { warehouse.cancel(order).await };
                    Grpc::new(ProstCodec::default()).unary(service_fn(act), request).await
                }
                IMPORT => {
                    let act = |orders| async { warehouse.import(orders).await };
                    Grpc::new(ProstCodec::default()).client_streaming(service_fn(act), request).await
                }
                _ => Status::unimplemented("").into_http(),
            })
        })
    }
}

#[derive(Clone)]
pub struct OrdersClient(tonic::client::Grpc<Channel>);

impl OrdersClient {
    pub fn new(channel: Channel) -> Self {
        OrdersClient(tonic::client::Grpc::new(channel))
    }

    pub async fn place(&self, order: Request<Order>) -> Result<Response<Receipt>, Status> {
        self.unary(order, PLACE).await
    }

    pub async fn cancel(&self, order: Request<Order>) -> Result<Response<Receipt>, Status> {
        self.unary(order, CANCEL).await
    }

    pub async fn import(
        &self,
        orders: Request<impl Stream<Item = Order> + Send + 'static>,
    ) -> Result<Response<Summary>, Status> {
        let mut grpc = self.ready().await?;
        grpc.client_streaming(orders, PathAndQuery::from_static(IMPORT), ProstCodec::default()).await
    }

    async fn unary(&self, order: Request<Order>, path: &'static str) -> Result<Response<Receipt>, Status> {
        let mut grpc = self.ready().await?;
        grpc.unary(order, PathAndQuery::from_static(path), ProstCodec::default()).await
    }

    async fn ready(&self) -> Result<tonic::client::Grpc<Channel>, Status> {
        let mut grpc = self.0.clone();
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(grpc)
    }
}
