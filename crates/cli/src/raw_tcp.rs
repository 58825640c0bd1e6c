//! Bare TCP between two processes: the floor that `potluck bench net` shows beside every kind of connection.

use crate::bench::{FRAME_BYTES, cpu_seconds, until_input_ends};
use anyhow::{Context, Result};
use potluck_net::Tasks;
use std::io::Write;
use std::net::Ipv4Addr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Print the address, then read from everybody until the standard input ends.
pub(crate) async fn receive() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("/ip4/127.0.0.1/tcp/{}", listener.local_addr()?.port());
    std::io::stdout().flush()?;
    let tasks = Tasks::new();
    until_input_ends(async {
        loop {
            let (socket, _) = listener.accept().await?;
            tasks.spawn(async move {
                // The sender notices and reports it.
                let _failed = swallow(socket).await;
            });
        }
    })
    .await
}

/// Read everything, then answer with the processor time that this process has used.
async fn swallow(mut socket: TcpStream) -> Result<()> {
    let mut buffer = vec![0; FRAME_BYTES];
    while socket.read(&mut buffer).await? > 0 {}
    Ok(socket.write_all(&cpu_seconds()?.to_be_bytes()).await?)
}

/// Send this many frames and return the receiver's answer.
pub(crate) async fn transfer(target: &str, frames: usize) -> Result<f64> {
    let port = target.rsplit('/').next().context("no address")?.parse()?;
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let frame = vec![7; FRAME_BYTES];
    for _ in 0..frames {
        socket.write_all(&frame).await?;
    }
    socket.shutdown().await?;
    let mut answer = [0; 8];
    socket.read_exact(&mut answer).await?;
    Ok(f64::from_be_bytes(answer))
}
