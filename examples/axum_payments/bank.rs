//! The world that the service depends on: cards, and a bank that knows nothing of idempotency keys.

use crate::Order;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::Duration;

/// What happens to those who pay with it, as with the cards that payment providers have for tests.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Card {
    Good,
    Declined,
    CrashesBefore,
    CrashesAfter,
    LosesTheAnswer,
}

/// Unwinds as a panic does, without a message on the terminal.
pub fn crash() -> ! {
    std::panic::resume_unwind(Box::new("the handler crashed"))
}

/// What it is told twice, it charges twice.
#[derive(Default)]
pub struct Bank {
    /// By merchant and order.
    accounts: Mutex<HashMap<(String, String), Account>>,
}

#[derive(Default)]
struct Account {
    newest_fence: u64,
    receipts: Vec<Receipt>,
}

#[derive(Clone, Copy)]
pub struct Receipt {
    pub number: u64,
    pub cents: u64,
}

pub enum Refusal {
    Declined,
    /// Whoever asks was given up for dead, and another one acts in its place.
    Superseded,
    NoAnswer,
}

impl Bank {
    pub async fn charge(&self, merchant: &str, order: &Order, fence: u64) -> std::result::Result<Receipt, Refusal> {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if order.card == Card::Declined {
            return Err(Refusal::Declined);
        }
        let receipt = Receipt { number: fastrand::u64(..), cents: order.cents };
        {
            let mut accounts = self.accounts.lock();
            let account = accounts.entry((merchant.to_owned(), order.number.clone())).or_default();
            if fence < account.newest_fence {
                return Err(Refusal::Superseded);
            }
            account.newest_fence = fence;
            account.receipts.push(receipt);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        if order.card == Card::LosesTheAnswer { Err(Refusal::NoAnswer) } else { Ok(receipt) }
    }

    /// All charges for an order; one that is good has one at most.
    pub fn charges(&self, merchant: &str, order: &str) -> Vec<Receipt> {
        let accounts = self.accounts.lock();
        accounts.get(&(merchant.to_owned(), order.to_owned())).map_or_else(Vec::new, |account| account.receipts.clone())
    }
}
