//! Merchants, and the ways in which they strain a payment service.

use crate::bank::Card;
use crate::{Order, Result};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;

/// How many duplicates a stampede has.
const STAMPEDE: usize = 50;

/// What a merchant does besides waiting for the answer.
#[derive(Clone, Copy)]
pub enum Habit {
    Retries,
    Stampedes,
    ChangesTheAmount,
    HangsUp,
}

#[derive(Clone)]
pub struct Payment {
    pub merchant: &'static str,
    pub key: String,
    pub order: Order,
    habit: Habit,
}

/// All habits with all cards. Two merchants each have the same keys, and orders with the same numbers.
pub fn payments(count: u64, run: u64) -> Vec<Payment> {
    use Habit::{ChangesTheAmount, HangsUp, Retries, Stampedes};
    let cards = [Card::Good, Card::Declined, Card::CrashesBefore, Card::CrashesAfter, Card::LosesTheAnswer];
    let habits = [Retries, Stampedes, ChangesTheAmount, HangsUp];
    let payment = |n: u64| Payment {
        merchant: if n.is_multiple_of(2) { "acme" } else { "globex" },
        key: format!("{run:x}-{}", n / 2),
        order: Order {
            number: format!("order-{}", n / 2),
            cents: 100 + n * 7919 % 10_000,
            card: cards[n as usize % 5],
        },
        habit: habits[n as usize / 5 % 4],
    };
    (0..count).map(payment).collect()
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
}

#[derive(Clone)]
pub struct Till {
    http: Client<HttpConnector, Full<Bytes>>,
    service: SocketAddr,
}

impl Till {
    pub fn new(service: SocketAddr) -> Till {
        Till { http: Client::builder(TokioExecutor::new()).build_http(), service }
    }

    pub async fn post(&self, path: &str, key: Option<&str>, merchant: &str, order: &Order) -> Result<Answer> {
        let mut request = Request::post(format!("http://{}{path}", self.service))
            .header(header::AUTHORIZATION, format!("Bearer {merchant}"))
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let (head, body) = self.http.request(request.body(serde_json::to_vec(order)?.into())?).await?.into_parts();
        Ok(Answer { status: head.status, body: body.collect().await?.to_bytes() })
    }

    async fn send(&self, Payment { merchant, key, order, .. }: &Payment) -> Result<Answer> {
        self.post("/payments", Some(key), merchant, order).await
    }

    /// Sends it until somebody knows how it ended.
    pub async fn insist(&self, payment: &Payment) -> Result<Answer> {
        for _ in 0..100 {
            match self.send(payment).await {
                Ok(answer) if matches!(answer.status, StatusCode::CREATED | StatusCode::PAYMENT_REQUIRED) => {
                    return Ok(answer);
                }
                Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
        Err(format!("{} got no answer to {}", payment.merchant, payment.order.number).into())
    }

    /// Pays as the merchant's habit is. Returns all answers that say how it ended.
    pub async fn pay(&self, payment: &Payment) -> Result<Vec<Answer>> {
        match payment.habit {
            Habit::Retries => {}
            Habit::Stampedes => {
                let mut duplicates = JoinSet::new();
                for _ in 0..STAMPEDE {
                    let (till, payment) = (self.clone(), payment.clone());
                    duplicates.spawn(async move { till.insist(&payment).await });
                }
                return duplicates.join_all().await.into_iter().collect();
            }
            Habit::ChangesTheAmount => {
                let first = self.insist(payment).await?;
                let mut changed = payment.clone();
                changed.order.cents += 1;
                let status = self.send(&changed).await?.status;
                if status != StatusCode::UNPROCESSABLE_ENTITY {
                    return Err(format!("another amount under the same key was answered with {status}").into());
                }
                return Ok(vec![first, self.insist(payment).await?]);
            }
            // The connection is closed while the handler waits for the bank; it doesn't notice.
            Habit::HangsUp => drop(tokio::time::timeout(Duration::from_millis(4), self.send(payment)).await),
        }
        Ok(vec![self.insist(payment).await?, self.insist(payment).await?])
    }
}
