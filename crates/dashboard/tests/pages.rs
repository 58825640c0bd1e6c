//! Every page answers over a real socket, live events arrive, and the server ends with its owner.

#![expect(clippy::unwrap_used, reason = "a helper of tests may panic")]

use potluck_collab::{Event, Status};
use potluck_dashboard::Dashboard;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{broadcast, watch};

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

async fn ask(address: SocketAddr, path: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    socket
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut text = String::new();
    ask(address, path).await.read_to_string(&mut text).await.unwrap();
    text
}

fn feed() -> (watch::Sender<Status>, broadcast::Sender<Event>) {
    let status = Status { run_id: "demo".into(), epoch: 4, rounds: 3, ..Status::default() };
    (watch::channel(status).0, broadcast::channel(8).0)
}

#[tokio::test]
async fn real_pages_show_the_one_status() {
    let (status, events) = feed();
    let dashboard = Dashboard::serve_feed(status.subscribe(), events.subscribe(), LOCAL).await.unwrap();
    let address = dashboard.address();
    for (path, holds) in
        [("/", "<main>"), ("/app.js", "EventSource"), ("/charts.js", "svg"), ("/style.css", ":root")]
    {
        let page = get(address, path).await;
        assert!(page.starts_with("HTTP/1.1 200") && page.contains(holds), "{path}: {page:.200}");
        assert!(!page.contains("https://"), "{path} must not ask anybody else");
    }
    let json = get(address, "/api/status").await;
    let body: Status = serde_json::from_str(json.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(body, *status.borrow());
    assert!(get(address, "/metrics").await.contains("potluck_rounds_total{run=\"demo\"} 3"));
    assert!(get(address, "/nothing").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn real_live_events_arrive_and_are_kept_for_later_pages() {
    let (status, events) = feed();
    let dashboard = Dashboard::serve_feed(status.subscribe(), events.subscribe(), LOCAL).await.unwrap();
    let mut live = ask(dashboard.address(), "/api/live").await;
    let (mut text, mut buffer) = (String::new(), [0u8; 4096]);
    // The first status proves that the page is subscribed; only then is the event sent.
    while !text.contains("event: status") {
        let read = live.read(&mut buffer).await.unwrap();
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    events.send(Event::Alone { epoch: 4, left: false }).unwrap();
    while !text.contains("\"event\":\"alone\"") {
        let read = live.read(&mut buffer).await.unwrap();
        assert!(read > 0, "the stream ended: {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    assert!(get(dashboard.address(), "/api/history").await.contains("ALONE at epoch 4"));
}

#[tokio::test]
async fn real_busy_port_is_one_clear_error_and_dropping_frees_it() {
    let (status, events) = feed();
    let first = Dashboard::serve_feed(status.subscribe(), events.subscribe(), LOCAL).await.unwrap();
    let address = first.address();
    let error = Dashboard::serve_feed(status.subscribe(), events.subscribe(), address).await.unwrap_err();
    assert!(error.to_string().contains(&address.to_string()) && error.to_string().contains("another port"));
    drop(first);
    let mut tries = 0;
    while let Err(error) = Dashboard::serve_feed(status.subscribe(), events.subscribe(), address).await {
        tries += 1;
        assert!(tries < 1000, "the port stays taken: {error}");
        tokio::task::yield_now().await;
    }
}
