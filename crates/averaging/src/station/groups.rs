//! Sans-I/O. The group of a round, looked up with every message and worked out once.

use super::Station;
use crate::grid;
use crate::plan::coordinators;
use crate::view::View;
use potluck_net::PeerId;
use std::collections::VecDeque;
use std::sync::Arc;

/// Rounds whose order is remembered: this one, and the next of this group, which has to be known as this one begins.
const ORDERS_MAX: usize = 4;

/// What is known of the groups as of one state of the view.
#[derive(Debug, Default)]
pub(super) struct Groups {
    generation: u64,
    /// Those of even and of odd rounds, which change only with the view.
    members: [Option<Arc<[PeerId]>>; 2],
    /// The members in the order in which they coordinate, by epoch.
    orders: VecDeque<(Option<u64>, Arc<[PeerId]>)>,
    of_many: bool,
}

impl Groups {
    /// There are more peers than those of the group.
    pub(super) fn of_many(&self) -> bool {
        self.of_many
    }
}

impl Station {
    /// The group of this round.
    pub(super) fn group(&mut self, view: &View, epoch: Option<u64>) -> Arc<[PeerId]> {
        let groups = &mut self.groups;
        if groups.generation != view.generation {
            *groups = Groups { generation: view.generation, ..Groups::default() };
        }
        if let Some((_, order)) = groups.orders.iter().find(|(of, _)| *of == epoch) {
            return order.clone();
        }
        let round = epoch.unwrap_or(0);
        let members = groups.members[(round % 2) as usize].get_or_insert_with(|| {
            let alive = view.members.iter().map(|(peer, member)| (peer, &member.place));
            grid::group(self.me, alive, round, self.group_max).into()
        });
        let all = members.iter().copied().chain([self.me]);
        let order: Arc<[PeerId]> = coordinators(&self.run, &self.channel, epoch, all).into();
        groups.of_many = order.len() < view.members.len();
        groups.orders.push_front((epoch, order.clone()));
        groups.orders.truncate(ORDERS_MAX);
        order
    }
}
