//! Faults as values: what a rule is told about a frame, and what it may decide.

use potluck_net::{PeerId, Protocol};
use std::time::Duration;

/// One frame at the moment at which its sender hands it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameInfo {
    /// Virtual time since the network was made.
    pub at: Duration,
    /// Who sends.
    pub from: PeerId,
    /// Who shall receive.
    pub to: PeerId,
    /// Under which protocol.
    pub protocol: Protocol,
    /// Length of the frame.
    pub bytes: usize,
    /// Which stream: numbers grow with the time at which streams were opened.
    pub stream: u64,
    /// Number of frames sent before this one in this direction of the stream.
    pub index: u64,
    /// Whether the sender is the one who opened the stream.
    pub from_opener: bool,
}

/// What becomes of a frame. No frame is ever lost inside a stream: TCP and QUIC do not do that either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// This rule has no opinion; the next one is asked.
    Pass,
    /// Late by this much, and so is everything behind it in its stream.
    Deliver(Duration),
    /// This direction of the stream stands still from this frame on, for as long as the rule stands.
    Stall,
    /// The stream is reset at both ends.
    Reset,
}

/// One attempt to open a stream, when it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenInfo {
    /// Virtual time since the network was made.
    pub at: Duration,
    /// Who opens.
    pub from: PeerId,
    /// To whom.
    pub to: PeerId,
    /// Under which protocol.
    pub protocol: Protocol,
}

pub(crate) type FrameRule = Box<dyn FnMut(&FrameInfo) -> Verdict + Send>;
pub(crate) type OpenRule = Box<dyn FnMut(&OpenInfo) -> bool + Send>;

/// The rules that stand, in the order in which they were set.
#[derive(Default)]
pub(crate) struct Rules {
    pub(crate) frames: Vec<(u64, FrameRule)>,
    pub(crate) opens: Vec<(u64, OpenRule)>,
}

impl Rules {
    /// The first verdict that is not `Pass`, with its rule.
    pub(crate) fn judge(&mut self, frame: &FrameInfo) -> Option<(u64, Verdict)> {
        self.frames.iter_mut().find_map(|(id, rule)| match rule(frame) {
            Verdict::Pass => None,
            verdict => Some((*id, verdict)),
        })
    }

    pub(crate) fn refuses(&mut self, open: &OpenInfo) -> bool {
        self.opens.iter_mut().any(|(_, rule)| rule(open))
    }
}
