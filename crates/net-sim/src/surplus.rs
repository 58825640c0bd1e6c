//! Connections that nobody uses, given up where a peer has too many, as the real network does it.

use crate::control::key;
use crate::trace::What;
use crate::world::{Event, Node, World};
use potluck_net::Watermarks;

const MARKS: Watermarks = Watermarks::PEER;

impl World {
    /// A stream begins on the connection of these two; which.
    pub(crate) fn stream_begins(&mut self, ends: [Node; 2]) -> u64 {
        let Some(conn) = self.conns.get_mut(&key(ends[0], ends[1])) else { return 0 };
        conn.streams += 1;
        conn.id
    }

    /// A stream on this connection is forgotten.
    pub(crate) fn stream_ended(&mut self, ends: [Node; 2], id: u64) {
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&key(ends[0], ends[1])).filter(|conn| conn.id == id) else {
            return;
        };
        conn.streams -= 1;
        if conn.streams > 0 {
            return;
        }
        conn.idle_since = now;
        self.trim_later(ends);
    }

    /// Those of these peers that have too many connections look again when one of now may have become idle.
    pub(crate) fn trim_later(&mut self, ends: [Node; 2]) {
        for end in ends {
            if self.peer(end).neighbours.len() > MARKS.high {
                self.schedule(self.now + MARKS.idle_min, Event::Trim(end));
            }
        }
    }

    pub(crate) fn trim(&mut self, node: Node) {
        let neighbours = &self.peer(node).neighbours;
        let total = neighbours.len();
        if total <= MARKS.high {
            return;
        }
        let idle = neighbours.iter().filter_map(|other| {
            let conn = self.conns.get(&key(node, *other)).filter(|conn| conn.streams == 0)?;
            Some((conn.idle_since, *other))
        });
        for other in MARKS.surplus(self.now, total, idle) {
            self.disconnect(node, other);
            self.note(node, other, None, 0, What::GivenUp);
        }
    }
}
