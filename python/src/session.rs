//! One peer's part in a run, as Python drives it: vectors in and out, states in and out, status as JSON.

use crate::buffer::{FlatBuffer, Shelf};
use crate::dlpack::Borrowed;
use crate::elements::Elements;
use crate::error::Error;
use crate::held::Held;
use crate::node::Node;
use crate::runtime;
use bytes::Bytes;
use potluck_collab::{
    Averaged, Event, Loaded, Policy, PolicyKind, PowerSgd, Purpose, Session as Core, SessionConfig, Snapshot,
    StateEvery, Step, TensorInfo, Terms,
};
use potluck_dashboard::Dashboard;
use potluck_net::Outcome;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::broadcast::{Receiver, error::TryRecvError};

/// What Python decides about a session; field names as in [`SessionConfig`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    run_id: String,
    target_batch_size: u64,
    tensors: Vec<TensorInfo>,
    state_tensors: Vec<TensorInfo>,
    grad_compression: Policy,
    state_compression: Policy,
    powersgd: Option<PowerSgd>,
    policy: PolicyKind,
    average_state_every: StateEvery,
    manifest_extra: BTreeMap<String, String>,
    auxiliary: bool,
    client_mode: bool,
    averaging_timeout: Option<f64>,
    load_state_timeout: f64,
    /// The peer id of the owner of a closed run, and the invite to it.
    owner: Option<String>,
    invite: Option<String>,
}

impl Options {
    fn config(self) -> Result<SessionConfig, Error> {
        let limit = |field, value| runtime::seconds(field, value);
        let read = |owner: &String| {
            owner.parse().map_err(|_| Error::Value(format!("owner={owner:?}: expected a peer id")))
        };
        Ok(SessionConfig {
            state_tensors: self.state_tensors,
            grad_compression: self.grad_compression,
            state_compression: self.state_compression,
            powersgd: self.powersgd,
            policy: self.policy,
            average_state_every: self.average_state_every,
            manifest_extra: self.manifest_extra,
            auxiliary: self.auxiliary,
            client_mode: self.client_mode,
            owner: self.owner.as_ref().map(read).transpose()?,
            invite: self.invite,
            averaging_timeout: limit("averaging_timeout", self.averaging_timeout)?,
            load_state_timeout: limit("load_state_timeout", Some(self.load_state_timeout))?
                .unwrap_or(Duration::from_secs(600)),
            ..SessionConfig::new(self.run_id, self.target_batch_size, self.tensors)
        })
    }
}

/// The epoch, facts and blobs of a state that others sent.
type LoadedState<'py> = (u64, BTreeMap<String, String>, Bound<'py, PyDict>);

/// What others sent, under its name: `("state", (epoch, facts, blobs))`, `("gradients", average)`, `("parameters", average)`.
type Found<'py> = (&'static str, Bound<'py, PyAny>);

/// One peer's part in a run.
#[pyclass(frozen, module = "potluck._core")]
pub(crate) struct Session {
    core: Core,
    events: Mutex<Receiver<Event>>,
    /// Memory of vectors between their rounds: gradients, parameters.
    gradients: Arc<Shelf>,
    state: Arc<Shelf>,
    /// Lives as long as the session.
    dashboard: Mutex<Option<Dashboard>>,
}

/// An average: `(values, alone, members, weight)`.
type Average = (FlatBuffer, bool, Vec<String>, f64);

/// The same with what each member handed to all.
type Gathered<'py> = (FlatBuffer, bool, Vec<(String, Bound<'py, PyBytes>)>, f64);

/// `None`: the others have finished the round without us and gone on, so there is nothing to apply.
fn average(outcome: Outcome<Averaged>, home: &Arc<Shelf>) -> Option<Average> {
    let Averaged { vector, members, weight_total, alone, missed, .. } = outcome.value;
    let members = members.iter().map(ToString::to_string).collect();
    (!missed).then(|| (FlatBuffer::from_vec(vector, home.clone()), alone, members, weight_total))
}

#[pymethods]
impl Session {
    /// Join the run that `options` (JSON) describe.
    #[staticmethod]
    fn join(py: Python<'_>, node: &Node, options: &str) -> Result<Self, Error> {
        let options: Options = serde_json::from_str(options)
            .map_err(|error| Error::Value(format!("options of the session: {error}")))?;
        let config = options.config()?;
        let core = node.join(py, config)?;
        let events = Mutex::new(core.events());
        let shelf = || Arc::new(Shelf::new(core.ledger().clone()));
        let (gradients, state) = (shelf(), shelf());
        Ok(Self { core, events, gradients, state, dashboard: Mutex::new(None) })
    }

    /// Serve the page that shows this run, at `"host:port"` (port 0: any free one), and answer its URL.
    fn serve_dashboard(&self, py: Python<'_>, address: &str) -> Result<String, Error> {
        let address = address
            .parse()
            .map_err(|_| Error::Value(format!("dashboard={address:?}: expected 'address:port'")))?;
        let served = runtime::wait(py, async {
            Dashboard::serve(&self.core, address).await.map_err(|error| Error::Value(error.to_string()))
        })?;
        let url = served.url();
        *self.dashboard.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(served);
        Ok(url)
    }

    /// Add samples; the name of what to do next.
    fn step(&self, samples: u64) -> &'static str {
        match self.core.step(samples) {
            Step::Accumulate => "accumulate",
            Step::Average => "average",
            Step::AverageState => "average_state",
            Step::Apply => "apply",
            Step::LoadState => "load_state",
        }
    }

    /// The epoch that this peer works on.
    #[getter]
    fn epoch(&self) -> u64 {
        self.core.epoch()
    }

    /// Wait until the answer of `step(0)` may have changed, at most this long.
    fn changed(&self, py: Python<'_>, seconds: f64) -> Result<(), Error> {
        let limit = runtime::seconds("seconds", Some(seconds))?.unwrap_or(Duration::MAX);
        runtime::wait(py, async {
            // Having waited long enough is an answer as well.
            let _waited = tokio::time::timeout(limit, self.core.changed()).await;
            Ok(())
        })
    }

    /// Average gradients; waits. `None`: the others finished without us; `load_state` follows.
    fn average_gradients(
        &self,
        py: Python<'_>,
        vector: &FlatBuffer,
        weight: f64,
    ) -> Result<Option<Average>, Error> {
        let vector = vector.copy_out(&self.gradients);
        let averaged = runtime::wait(py, async { Ok(self.core.average_gradients(vector, weight).await) })?;
        Ok(average(averaged, &self.gradients))
    }

    /// Average once, at most so many seconds long, and hand `gather` to all members; waits.
    fn gather_gradients<'py>(
        &self,
        py: Python<'py>,
        vector: &FlatBuffer,
        weight: f64,
        gather: Vec<u8>,
        seconds: Option<f64>,
    ) -> Result<Gathered<'py>, Error> {
        if gather.len() > Terms::GATHER_BYTES_MAX {
            let most = Terms::GATHER_BYTES_MAX;
            return Err(Error::Value(format!("gather: {} bytes, at most {most}", gather.len())));
        }
        let terms = Terms { gather: gather.into(), limit: runtime::seconds("timeout", seconds)? };
        let vector = vector.copy_out(&self.gradients);
        let averaged =
            runtime::wait(py, async { Ok(self.core.average_gradients_on(terms, vector, weight).await) })?;
        let Averaged { vector, members, gathered, weight_total, alone, .. } = averaged.value;
        let values = FlatBuffer::from_vec(vector, self.gradients.clone());
        let said = gathered.iter().map(|bytes| PyBytes::new(py, bytes));
        let members = members.iter().map(ToString::to_string).zip(said).collect();
        Ok((values, alone, members, weight_total))
    }

    /// If the last round failed although others were here, and nothing was applied: whether it was so.
    fn round_void(&self) -> Result<bool, Error> {
        let handle = runtime::handle()?;
        let _guard = handle.enter();
        Ok(self.core.round_void())
    }

    /// Take over the history of those who are ahead, without their state; whether somebody was.
    fn follow(&self) -> Result<bool, Error> {
        let handle = runtime::handle()?;
        let _guard = handle.enter();
        Ok(self.core.follow())
    }

    /// Average parameters; waits. `None`: the others finished without us; `load_state` follows.
    fn average_state(&self, py: Python<'_>, vector: &FlatBuffer) -> Result<Option<Average>, Error> {
        let vector = vector.copy_out(&self.state);
        let averaged = runtime::wait(py, async { Ok(self.core.average_state(vector).await) })?;
        Ok(average(averaged, &self.state))
    }

    /// Average gradients beside the next samples.
    fn start_gradients(&self, vector: &FlatBuffer, weight: f64) -> Result<(), Error> {
        let _entered = runtime::handle()?;
        let _guard = _entered.enter();
        self.core.start_gradients(vector.copy_out(&self.gradients), weight);
        Ok(())
    }

    /// Average parameters beside the next samples.
    fn start_state(&self, vector: &FlatBuffer) -> Result<(), Error> {
        let handle = runtime::handle()?;
        let _guard = handle.enter();
        self.core.start_state(vector.copy_out(&self.state));
        Ok(())
    }

    /// What was started and is ready: `("gradients" | "state", average)`; no average if the others finished without us.
    fn take_started(&self) -> Option<(&'static str, Option<Average>)> {
        let started = self.core.take_started()?;
        let (name, home) = match started.channel {
            potluck_collab::Channel::Gradients => ("gradients", &self.gradients),
            potluck_collab::Channel::State => ("state", &self.state),
        };
        Some((name, average(started.averaged, home)))
    }

    /// The delayed optimizer step has finished.
    fn optimizer_ready(&self) {
        self.core.optimizer_ready();
    }

    /// What was to be applied is given up after an error; whether there was anything: then publish the state as it is.
    fn abandon(&self) -> Result<bool, Error> {
        let handle = runtime::handle()?;
        let _guard = handle.enter();
        Ok(self.core.abandon())
    }

    /// One epoch further, with the state that newcomers are to get.
    fn epoch_done(
        &self,
        py: Python<'_>,
        state: Option<(BTreeMap<String, String>, Bound<'_, PyDict>)>,
    ) -> Result<(), Error> {
        let snapshot = state.map(snapshot).transpose()?;
        let handle = runtime::handle()?;
        py.detach(|| {
            let _guard = handle.enter();
            self.core.epoch_done(snapshot);
        });
        Ok(())
    }

    /// Offer the present state to newcomers.
    fn publish(
        &self,
        py: Python<'_>,
        meta: BTreeMap<String, String>,
        blobs: Bound<'_, PyDict>,
    ) -> Result<(), Error> {
        let snapshot = snapshot((meta, blobs))?;
        let handle = runtime::handle()?;
        py.detach(|| {
            let _guard = handle.enter();
            self.core.publish(snapshot);
        });
        Ok(())
    }

    /// Offer an average as it is, without copying it: tensors of these sizes in bytes, in order, under these names.
    /// Nobody may write to `vector` any more.
    fn publish_average(
        &self,
        py: Python<'_>,
        meta: BTreeMap<String, String>,
        vector: &FlatBuffer,
        sizes: Vec<(String, usize)>,
    ) -> Result<(), Error> {
        let (whole, mut blobs, mut start) = (vector.sealed(), BTreeMap::new(), 0);
        for (name, size) in sizes {
            let end = start + size;
            if end > whole.len() {
                return Err(Error::Value(format!("{name} ends at byte {end} of {}", whole.len())));
            }
            blobs.insert(name, whole.slice(start..end));
            start = end;
        }
        let handle = runtime::handle()?;
        py.detach(|| {
            let _guard = handle.enter();
            self.core.publish(Snapshot { meta, blobs, ..Snapshot::default() });
        });
        Ok(())
    }

    /// Load the state of others: `(epoch, facts, blobs)`, or `None` if nobody is ahead or it did not work.
    #[pyo3(signature = (seconds=None))]
    fn load_state<'py>(
        &self,
        py: Python<'py>,
        seconds: Option<f64>,
    ) -> Result<Option<LoadedState<'py>>, Error> {
        let limit = runtime::seconds("timeout", seconds)?;
        let loaded = runtime::wait(py, async { Ok(self.core.load_whole_state(limit).await) })?;
        loaded.value.map(|snapshot| loaded_state(py, snapshot)).transpose()
    }

    /// Get what others have: `("state", (epoch, facts, blobs))`, or the average of the next round that this peer missed,
    /// `("gradients", average)` or `("parameters", average)`. `None` if nobody is ahead or it did not work.
    fn catch_up<'py>(&self, py: Python<'py>) -> Result<Option<Found<'py>>, Error> {
        let loaded = runtime::wait(py, async { Ok(self.core.load_state().await) })?;
        let buffer = |vector, home: &Arc<Shelf>| {
            let buffer = FlatBuffer::from_vec(vector, home.clone());
            Bound::new(py, buffer).map(Bound::into_any)
        };
        Ok(match loaded.value {
            Loaded::Nothing => None,
            Loaded::Gradients(vector) => Some(("gradients", buffer(vector, &self.gradients)?)),
            Loaded::Parameters(vector) => Some(("parameters", buffer(vector, &self.state)?)),
            Loaded::State(snapshot) => {
                Some(("state", loaded_state(py, snapshot)?.into_pyobject(py)?.into_any()))
            }
        })
    }

    /// The state that was given last is taken over: others hear of it at once, and not only at the next step.
    fn accept_state(&self, py: Python<'_>) -> Result<(), Error> {
        let handle = runtime::handle()?;
        py.detach(|| {
            let _guard = handle.enter();
            self.core.accept_state();
        });
        Ok(())
    }

    /// The state that was given last is not taken over; whether the program has `kept` its own whole. Whether there was one.
    fn refuse_state(&self, py: Python<'_>, reason: &str, kept: bool) -> Result<bool, Error> {
        let handle = runtime::handle()?;
        Ok(py.detach(|| {
            let _guard = handle.enter();
            self.core.refuse_state(reason, kept)
        }))
    }

    /// Show a buffer in the status, under the name of a purpose, for as long as it lives.
    fn hold(&self, purpose: &str, buffer: &FlatBuffer) -> Result<(), Error> {
        buffer.hold(self.core.ledger(), named(purpose)?);
        Ok(())
    }

    /// Show so many bytes of torch's in the status, until what is returned goes.
    fn hold_bytes(&self, purpose: &str, bytes: u64) -> Result<Held, Error> {
        Ok(Held { _held: self.core.ledger().hold(named(purpose)?, bytes) })
    }

    /// The loss, to be shown to everybody.
    fn report_loss(&self, loss: f32) {
        self.core.report_loss(loss);
    }

    /// The status as JSON.
    fn status(&self) -> Result<String, Error> {
        let status = self.core.status();
        let status = status.borrow();
        serde_json::to_string(&*status).map_err(|error| Error::State(error.to_string()))
    }

    /// What happened since the last call: `(is a warning, line, JSON)`.
    fn take_events(&self) -> Vec<(bool, String, String)> {
        let mut events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut taken = Vec::new();
        loop {
            match events.try_recv() {
                Ok(event) => {
                    let loud = event.is_warning();
                    let json = serde_json::to_string(&event).unwrap_or_default();
                    taken.push((loud, event.to_string(), json));
                }
                // The reader was slow; the oldest are gone.
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => return taken,
            }
        }
    }

    /// Leave the run; at most `seconds`.
    fn leave(&self, py: Python<'_>, seconds: f64) -> Result<(), Error> {
        let limit = runtime::seconds("seconds", Some(seconds))?.unwrap_or(Duration::from_secs(5));
        self.gradients.close();
        self.state.close();
        runtime::wait(py, async {
            // The others notice anyway; leaving politely only tells them sooner.
            let _left = tokio::time::timeout(limit, self.core.leave()).await;
            self.dashboard.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            Ok(())
        })
    }
}

fn loaded_state(py: Python<'_>, snapshot: Snapshot) -> Result<LoadedState<'_>, Error> {
    let Snapshot { epoch, meta, blobs, .. } = snapshot;
    let dict = PyDict::new(py);
    for (name, blob) in blobs {
        dict.set_item(name, Elements::of_bytes(blob))?;
    }
    Ok((epoch, meta, dict))
}

fn named(purpose: &str) -> Result<Purpose, Error> {
    Purpose::from_name(purpose).ok_or_else(|| {
        let known = Purpose::ALL.map(Purpose::name).join(", ");
        Error::Value(format!("purpose={purpose:?}: expected one of {known}"))
    })
}

fn snapshot((meta, blobs): (BTreeMap<String, String>, Bound<'_, PyDict>)) -> Result<Snapshot, Error> {
    let mut copied = BTreeMap::new();
    for (name, tensor) in blobs.iter() {
        let tensor = Borrowed::new(&tensor)?;
        copied.insert(name.extract::<String>()?, Bytes::copy_from_slice(tensor.bytes()));
    }
    Ok(Snapshot { meta, blobs: copied, ..Snapshot::default() })
}
