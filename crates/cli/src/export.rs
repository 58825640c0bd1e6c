//! `potluck export`: the weights of a keeper's checkpoint as a file that torch loads without potluck.

use crate::checkpoint::{self, Checkpoint};
use crate::failure::Failure;
use crate::pickle::{self, Tensor};
use crate::tensors::{self, Shape};
use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

pub(crate) const HELP: &str = "Parameters are named by their number (param.000000, ...), because that is all a run knows of \
them; --names gives them the model's own names:\n  python -c 'import mymodel; \
print(*[name for name, _ in mymodel.Net().named_parameters()], sep=\"\\n\")' > names.txt\n\n\
Examples:\n  potluck export kept --output weights.safetensors\n  \
potluck export kept/epoch-000000000120 --names names.txt --output weights.pt";

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// A checkpoint, or a keeper's folder (then its newest)
    checkpoint: PathBuf,
    /// File to write: .pt for torch.load, .safetensors for safetensors.torch.load_file
    #[arg(long)]
    output: PathBuf,
    /// Text file with the names of the parameters, one a line, in the optimizer's order
    #[arg(long)]
    names: Option<PathBuf>,
}

/// Write the weights.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut checkpoint = open(&args.checkpoint)?;
    checkpoint.decode()?;
    let names = args.names.as_deref().map(read_names).transpose()?;
    let shapes = tensors::shapes(&checkpoint.snapshot.meta);
    let tensors = weights(&checkpoint, &shapes, names.as_deref())?;
    let temporary = args.output.with_extension("partial");
    let what = || format!("cannot write {}", args.output.display());
    let written = write(&temporary, &args.output, &tensors);
    if let Err(error) = written.and_then(|()| Ok(fs::rename(&temporary, &args.output)?)) {
        // It may not even have been made; the error is what matters.
        let _removed = fs::remove_file(&temporary);
        return Err(error).with_context(what);
    }
    println!(
        "wrote {} ({} tensors of epoch {})",
        args.output.display(),
        tensors.len(),
        checkpoint.snapshot.epoch
    );
    Ok(())
}

fn open(path: &Path) -> Result<Checkpoint> {
    if path.join("checkpoint.json").exists() {
        return Checkpoint::load(path);
    }
    let (found, wrong) = checkpoint::newest(path)?;
    for error in &wrong {
        eprintln!("potluck: {error:#}; looking for an older one");
    }
    let none =
        || Failure::new(format!("{} holds no checkpoint", path.display()), "`potluck keeper` makes them");
    Ok(found.ok_or_else(none)?.1)
}

fn read_names(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

fn weights<'a>(
    checkpoint: &'a Checkpoint,
    shapes: &'a BTreeMap<String, Shape>,
    names: Option<&[String]>,
) -> Result<Vec<Tensor<'a>>> {
    let blobs = &checkpoint.snapshot.blobs;
    let parameters: Vec<&String> = blobs.keys().filter(|name| name.starts_with("param.")).collect();
    if let Some(names) = names.filter(|names| names.len() != parameters.len()) {
        let message = format!("{} names for {} parameters", names.len(), parameters.len());
        return Err(
            Failure::new(message, "one name a line, in the order in which the optimizer got them").into()
        );
    }
    let extras = blobs.keys().filter(|name| name.starts_with("extra."));
    let renamed = parameters.iter().enumerate().map(|(at, key)| {
        let name = names.and_then(|names| names.get(at)).unwrap_or(key);
        (*key, name.clone())
    });
    renamed
        .chain(extras.map(|key| (key, key.clone())))
        .map(|(key, name)| {
            let shape = shapes.get(key).ok_or_else(|| {
                Failure::new(
                    format!("the checkpoint does not say which shape {key} has"),
                    "its run was trained by an older version; read state.safetensors and reshape by hand",
                )
            })?;
            let bytes = blobs.get(key).context("a tensor is missing")?;
            tensors::dtype_of(&shape.dtype).with_context(|| format!("{key}: {}", shape.dtype))?;
            // More than can be counted is more than is there.
            let expected = shape.bytes().unwrap_or(usize::MAX);
            anyhow::ensure!(bytes.len() == expected, "{key}: {} bytes, {expected} expected", bytes.len());
            Ok(Tensor { name, shape, bytes })
        })
        .collect()
}

fn write(temporary: &Path, output: &Path, tensors: &[Tensor<'_>]) -> Result<()> {
    let mut out = BufWriter::new(File::create(temporary)?);
    match output.extension().and_then(|extension| extension.to_str()) {
        Some("pt" | "pth" | "bin") => pickle::write(&mut out, tensors)?,
        Some("safetensors") => {
            let mut views = Vec::new();
            for Tensor { name, shape, bytes } in tensors {
                let (dtype, _) = tensors::dtype_of(&shape.dtype).context("unknown element type")?;
                views.push((name, safetensors::tensor::TensorView::new(dtype, shape.shape.clone(), bytes)?));
            }
            out.write_all(&safetensors::serialize(views, None)?)?;
        }
        _ => {
            let message = format!("{} has no known ending", output.display());
            return Err(Failure::new(message, "end it in .pt or .safetensors").into());
        }
    }
    out.into_inner().map_err(|error| error.into_error())?.sync_all()?;
    Ok(())
}
