//! Who reads what at this moment.

use std::sync::Arc;

use tokio::sync::watch;

use super::forest::common;
use super::shelf::Root;
use crate::types::Tenant;

/// The texts that are being read.
#[derive(Debug, Default)]
pub(super) struct Flights {
    flights: Vec<(u64, Flight)>,
    next: u64,
}

/// A text that is being read, and where states of it will be kept.
#[derive(Debug)]
pub(super) struct Flight {
    tenant: Tenant,
    root: Root,
    ids: Arc<[u32]>,
    /// Ascending.
    stops: Vec<usize>,
    /// How many ids the last state that was kept has read. Closed when no more follow.
    reached: watch::Sender<usize>,
}

/// What those who are reading know of another text.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Who will come to the deepest state on its way, and at how many ids.
    pub ahead: Option<(watch::Receiver<usize>, usize)>,
    /// How many ids some of them share with it.
    pub known: usize,
}

impl Flight {
    pub fn new(tenant: Tenant, root: Root, ids: Arc<[u32]>, stops: Vec<usize>) -> Self {
        Self { tenant, root, ids, stops, reached: watch::Sender::new(0) }
    }
}

impl Flights {
    /// What is being read of a text, but for its last token, which must be read anyhow.
    pub fn look(&self, tenant: &Tenant, root: &Root, ids: &[u32]) -> Seen {
        let mut seen = Seen::default();
        let same = |flight: &&Flight| flight.tenant == *tenant && flight.root == *root;
        for flight in self.flights.iter().map(|(_, flight)| flight).filter(same) {
            let shared = common(&flight.ids, ids);
            seen.known = seen.known.max(shared);
            let on_the_way = shared.min(ids.len().saturating_sub(1));
            let Some(&at) = flight.stops.iter().rfind(|&&stop| stop <= on_the_way) else { continue };
            let is_ahead = at > *flight.reached.borrow();
            if is_ahead && seen.ahead.as_ref().is_none_or(|&(_, best)| at > best) {
                seen.ahead = Some((flight.reached.subscribe(), at));
            }
        }
        seen
    }

    /// Somebody begins to read a text.
    pub fn begin(&mut self, flight: Flight) -> u64 {
        let id = self.next;
        self.next += 1;
        self.flights.push((id, flight));
        id
    }

    /// A state after so many ids was kept. After the last one nobody has to look at it any more.
    pub fn reach(&mut self, id: u64, reached: usize) {
        let Some((_, flight)) = self.flights.iter().find(|(known, _)| *known == id) else { return };
        flight.reached.send_replace(reached);
        if flight.stops.last().is_none_or(|&last| last <= reached) {
            self.end(id);
        }
    }

    /// It is read no further.
    pub fn end(&mut self, id: u64) {
        self.flights.retain(|(known, _)| *known != id);
    }
}

#[cfg(test)]
mod tests {
    use super::super::shelf::From;
    use super::*;

    fn root(beginning: &str) -> Root {
        Root { fingerprint: "weights".into(), from: From::Beginning(beginning.into()) }
    }

    fn tenant(name: &str) -> Tenant {
        Tenant::parse(name).expect("a tenant")
    }

    #[test]
    fn who_will_come_furthest_on_the_way_is_followed() {
        let mut flights = Flights::default();
        let mut begin = |owner: &str, len: usize, stops: &[usize]| {
            let ids: Arc<[u32]> = vec![7; len].into();
            flights.begin(Flight::new(tenant(owner), root("zeros"), ids, stops.to_vec()))
        };
        let near = begin("a", 50, &[10, 50]);
        let far = begin("a", 90, &[40, 80, 90]);
        begin("b", 200, &[199]);
        let ids: Vec<u32> = [vec![7; 85], vec![8; 20]].concat();
        let look = |flights: &Flights, beginning: &str| flights.look(&tenant("a"), &root(beginning), &ids);

        let seen = look(&flights, "zeros");
        let (reached, at) = seen.ahead.expect("both are ahead");
        assert_eq!((at, seen.known, *reached.borrow()), (80, 85, 0));
        assert!(look(&flights, "ones").ahead.is_none());
        flights.reach(far, 80);
        assert_eq!((*reached.borrow(), reached.has_changed().is_ok()), (80, true));
        assert_eq!(look(&flights, "zeros").ahead.map(|(_, at)| at), Some(50), "what is reached is kept already");
        flights.reach(far, 90);
        assert!(reached.has_changed().is_err(), "nothing follows");
        flights.end(near);
        assert!(look(&flights, "zeros").ahead.is_none());
        // Of a text that is read to its end, the last token is read again.
        let whole = flights.look(&tenant("b"), &root("zeros"), &[7; 199]);
        assert_eq!((whole.ahead.map(|(_, at)| at), whole.known), (None, 199));
    }
}
