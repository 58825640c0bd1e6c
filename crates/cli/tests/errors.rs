//! docs/errors.md explains every message with which the code refuses something: what stands in the source is looked up
//! there, word by word.

use std::path::{Path, PathBuf};

/// What differs from case to case, in a message and on the page.
const ANY: char = '\u{1}';

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The files below `folder` that end so, without their tests.
fn sources(folder: &str, end: &str) -> Vec<(PathBuf, String)> {
    let mut folders = vec![root().join(folder)];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("it can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == end) {
                let text = std::fs::read_to_string(&path).expect("it is text");
                let code = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
                found.push((path, code));
            }
        }
    }
    found
}

/// The string literal at the start of `code`, its placeholders replaced, and what follows it.
fn literal(code: &str) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = code.strip_prefix('"')?.char_indices();
    let mut depth = 0;
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Some((out, &code[at + 2..])),
            '\\' => match chars.next()?.1 {
                'n' => out.push(' '),
                // The next line continues this one.
                '\n' => out.push(' '),
                other => out.push(other),
            },
            '{' => {
                depth += 1;
                out.push(ANY);
            }
            '}' => depth -= 1,
            char if depth == 0 => out.push(char),
            _ => {}
        }
    }
    None
}

/// The literals that stand directly behind `start`, or somewhere before `end` if that is given.
fn messages(code: &str, start: &str, end: Option<&str>) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices(start) {
        // A start may end within the literal.
        let mut rest = &code[at + start.find('"').unwrap_or(start.len())..];
        if let Some(end) = end {
            let mut within = rest.split(end).next().unwrap_or_default();
            while let Some(quote) = within.find('"') {
                let Some((message, after)) = literal(&within[quote..]) else { break };
                found.push(message);
                within = after;
            }
            continue;
        }
        let mut joined = String::new();
        loop {
            rest = rest.trim_start().trim_start_matches("format!(").trim_start_matches('f').trim_start();
            let Some((message, after)) = literal(rest) else { break };
            joined.push_str(&message);
            rest = after;
        }
        found.push(joined.trim_start_matches("potluck: ").to_owned());
    }
    found
}

/// One blank between words, and nothing that is only there for the eye.
fn plain(text: &str) -> String {
    let text: String = text.chars().filter(|char| !"`\"'".contains(*char)).collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The messages of the page; words in capitals and dots stand for anything.
fn explained() -> Vec<String> {
    let page = std::fs::read_to_string(root().join("docs/errors.md")).expect("the page is there");
    let quoted = page.lines().filter_map(|line| {
        let quoted = line.strip_prefix("### `").or_else(|| line.strip_prefix("* `"))?;
        // A message may have backticks of its own; what follows the last one is said about it.
        Some(quoted.split("`: ").next()?.trim_end_matches('`').to_owned())
    });
    let fixed = |word: &str| {
        let core = word.trim_matches(['(', ')', ':', ';', ',']);
        let mut letters = core.chars().filter(|char| char.is_alphabetic()).peekable();
        let differs = core == "..." || (letters.peek().is_some() && letters.all(char::is_uppercase));
        if differs { word.replacen(core, &ANY.to_string(), 1) } else { word.to_owned() }
    };
    quoted.map(|line| plain(&line).split(' ').map(fixed).collect::<Vec<_>>().join(" ")).collect()
}

/// Whether `pattern`, in which [`ANY`] stands for any text, fits `message`.
fn fits(pattern: &str, message: &str) -> bool {
    let parts: Vec<&str> = pattern.split(ANY).collect();
    let (first, last) = (parts[0], parts[parts.len() - 1]);
    if parts.len() == 1 {
        return message == pattern;
    }
    let Some(mut rest) = message.strip_prefix(first) else { return false };
    for part in &parts[1..parts.len() - 1] {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Of letters that are always the same there must be some, or the message is that of its cause.
fn says_something(message: &str) -> bool {
    message.chars().filter(|char| char.is_alphabetic()).count() > 5
}

fn unexplained(found: impl IntoIterator<Item = (PathBuf, String)>) -> Vec<String> {
    let page = explained();
    assert!(page.len() > 60, "{page:?}");
    let mut missing: Vec<String> = Vec::new();
    for (path, message) in found {
        let message = plain(&message);
        // The page may show that a cause follows.
        let caused = format!("{message} {ANY}");
        if says_something(&message)
            && !page.iter().any(|pattern| fits(pattern, &message) || fits(pattern, &caused))
        {
            let shown = message.replace(ANY, "{}");
            missing.push(format!("{}: {shown}", path.file_name().unwrap_or_default().to_string_lossy()));
        }
    }
    missing.sort();
    missing.dedup();
    missing
}

#[test]
fn every_message_of_the_command_is_explained() {
    let starts = [
        ("Failure::new(", None),
        ("let message", Some(";\n")),
        (".context(", None),
        ("with_context(|| ", None),
        ("let what = || ", None),
        ("let broken = || ", None),
        ("bail!(", None),
        ("anyhow!(", None),
        ("ensure!(", Some(");")),
        ("eprintln!(\"potluck: ", None),
    ];
    let found = sources("crates/cli/src", "rs").into_iter().flat_map(|(path, code)| {
        // A long message begins a line of its own.
        let code = code.split("eprintln!(").map(str::trim_start).collect::<Vec<_>>().join("eprintln!(");
        let all = starts.iter().flat_map(|(start, end)| messages(&code, start, *end)).collect::<Vec<_>>();
        all.into_iter().map(move |message| (path.clone(), message))
    });
    let found: Vec<_> = found.collect();
    assert!(found.len() > 80, "{found:?}");
    let missing = unexplained(found);
    assert!(missing.is_empty(), "docs/errors.md lacks {missing:#?}");
}

#[test]
fn every_message_of_the_golden_files_is_explained() {
    let page = explained();
    let golden = sources("crates/cli/tests/golden", "txt");
    let said = golden.iter().flat_map(|(_, text)| {
        text.lines().filter_map(|line| {
            let tail = |start: &str| line.find(start).map(|at| &line[at..]);
            line.strip_prefix("potluck: ").or_else(|| tail("this token is "))
        })
    });
    let said: Vec<String> = said.map(plain).collect();
    assert!(said.len() > 30, "{said:?}");
    let known = |line: &String| page.iter().any(|pattern| fits(&format!("{pattern}{ANY}"), line));
    let missing: Vec<&String> = said.iter().filter(|line| !known(line)).collect();
    assert!(missing.is_empty(), "docs/errors.md lacks {missing:#?}");
}

#[test]
fn every_error_type_of_the_crates_is_explained() {
    let found: Vec<_> = sources("crates", "rs")
        .into_iter()
        .filter(|(path, _)| path.components().any(|part| part.as_os_str() == "src"))
        .flat_map(|(path, code)| {
            messages(&code, "#[error(", None).into_iter().map(move |it| (path.clone(), it))
        })
        .collect();
    assert!(found.len() > 80, "{found:?}");
    let missing = unexplained(found);
    assert!(missing.is_empty(), "docs/errors.md lacks {missing:#?}");
}

#[test]
fn every_python_error_that_is_not_about_an_argument_is_explained() {
    let starts = ["RuntimeError(", "TimeoutError(", "ImportError(", "PeerError(", "DemoFailed("]
        .map(|kind| format!("raise {kind}"));
    let python = sources("python/potluck", "py").into_iter().flat_map(|(path, code)| {
        let code = code.replace("_core.", "");
        let all: Vec<_> = starts.iter().flat_map(|start| messages(&code, start, None)).collect();
        all.into_iter().map(move |message| (path.clone(), message))
    });
    let door = sources("python/src", "rs").into_iter().flat_map(|(path, code)| {
        let starts = ["Error::State(", "Error::Peer("];
        let all: Vec<_> = starts.iter().flat_map(|start| messages(&code, start, None)).collect();
        all.into_iter().map(move |message| (path.clone(), message.trim_end_matches(".into()").to_owned()))
    });
    let found: Vec<_> = python.chain(door).collect();
    assert!(found.len() > 20, "{found:?}");
    let missing = unexplained(found);
    assert!(missing.is_empty(), "docs/errors.md lacks {missing:#?}");
}

#[test]
fn a_pattern_fits_what_it_says_and_nothing_else() {
    let any = |text: &str| text.replace('*', &ANY.to_string());
    assert!(fits(&any("cannot read *: *"), "cannot read x: no such file"));
    assert!(!fits(&any("cannot read *: *"), "cannot write x: no such file"));
    assert!(fits("whole", "whole") && !fits("whole", "the whole"));
    let messages = messages("bail!(\"a {x} b\\\n   c {}\", y)", "bail!(", None);
    assert_eq!(messages.iter().map(|it| plain(it)).collect::<Vec<_>>(), [any("a * b c *")]);
}
