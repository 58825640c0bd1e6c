//! Style as a test: layers, file headers, file and function length, machine paths, the one crate that names libp2p.
//! The rules are CONTRIBUTING.md's; a rule that no machine checks does not last.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Longest file and longest function, in lines. "About 600" and "about 70", with room so that nobody counts lines.
const FILE_LINES_MAX: usize = 640;
const FUNCTION_LINES_MAX: usize = 80;

/// Layer of each package: it may depend on packages of a lower layer only, and on `net`, the seam, from L0 up.
const LAYERS: &[(&str, u8)] = &[
    ("potluck-compression", 0),
    ("potluck-net", 0),
    ("potluck-net-conformance", 1),
    ("potluck-net-libp2p", 1),
    ("potluck-net-sim", 1),
    ("potluck-dht", 1),
    ("potluck-averaging", 2),
    ("potluck-transfer", 2),
    ("potluck-collab", 3),
    ("potluck-dashboard", 4),
    ("potluck-cli", 5),
    ("potluck-python", 5),
    ("potluck-tests", 6),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_path_buf()
}

/// Tracked files only, so that build output and local experiments do not count.
fn tracked(extensions: &[&str]) -> Vec<(PathBuf, String)> {
    let output = Command::new("git").arg("ls-files").current_dir(root()).output().expect("git runs");
    assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout)
        .expect("paths are UTF-8")
        .lines()
        .filter(|path| extensions.iter().any(|extension| path.ends_with(extension)))
        .filter_map(|path| Some((PathBuf::from(path), std::fs::read_to_string(root().join(path)).ok()?)))
        .collect()
}

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

fn assert_none(problems: Vec<String>, rule: &str) {
    assert!(problems.is_empty(), "{rule}\n  {}", problems.join("\n  "));
}

#[test]
fn dependencies_go_down_only() {
    let layers: BTreeMap<&str, u8> = LAYERS.iter().copied().collect();
    let mut problems = Vec::new();
    for package in metadata()["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("name");
        let Some(layer) = layers.get(name) else {
            problems.push(format!("{name} has no layer: add it to LAYERS"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            // A test may use the simulator, whatever its layer.
            let normal = dependency["kind"].is_null();
            let target = dependency["name"].as_str().expect("name");
            if let (true, Some(below)) = (normal, layers.get(target))
                && below >= layer
            {
                problems.push(format!("{name} (L{layer}) depends on {target} (L{below})"));
            }
        }
    }
    assert_none(problems, "dependencies go down only (ARCHITECTURE.md, code map)");
}

#[test]
fn only_net_libp2p_names_libp2p() {
    let mut problems = Vec::new();
    for package in metadata()["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("name");
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let target = dependency["name"].as_str().expect("name");
            if name != "potluck-net-libp2p" && (target == "libp2p" || target.starts_with("libp2p-")) {
                problems.push(format!("{name} depends on {target}"));
            }
        }
    }
    assert_none(problems, "only net-libp2p names libp2p (invariant 12)");
}

/// A change of a crate's dependencies is forgotten there easily: nothing but `make check` and `make fuzz` reads that file.
#[test]
fn the_fuzz_targets_lock_file_knows_what_the_crates_need() {
    let lock = std::fs::read_to_string(root().join("fuzz/Cargo.lock")).expect("fuzz/Cargo.lock");
    let locked: BTreeMap<&str, &str> =
        lock.split("[[package]]\nname = \"").filter_map(|package| package.split_once('"')).collect();
    let (mut problems, mut seen) = (Vec::new(), 0);
    for package in metadata()["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("name");
        let Some(known) = locked.get(name) else { continue };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let target = dependency["name"].as_str().expect("name");
            let needed = dependency["kind"].is_null() && dependency["optional"] == false;
            seen += usize::from(needed);
            // With a version behind it where several are locked.
            if needed && !known.contains(&format!("\"{target}\"")) && !known.contains(&format!("\"{target} "))
            {
                problems.push(format!("{name} needs {target}"));
            }
        }
    }
    assert!(seen > 50, "{seen} dependencies, so the lock file was misread");
    assert_none(problems, "fuzz/Cargo.lock lacks them: (cd fuzz && cargo check)");
}

/// Each package of `cargo tree` with these arguments, with the features that it is built with.
fn built_features(arguments: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--prefix", "none", "--format", "{p}|{f}"])
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let mut built: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in String::from_utf8(output.stdout).expect("UTF-8").lines() {
        let Some((package, features)) = line.split_once('|') else { continue };
        built.entry(package.to_owned()).or_default().insert(features.trim_end_matches(" (*)").to_owned());
    }
    built
}

#[test]
fn the_wheel_and_the_command_reuse_what_the_tests_compiled() {
    let tests = built_features(&["--workspace", "--all-features", "--edges", "normal,build,dev"]);
    let mut problems = Vec::new();
    for package in ["potluck-python", "potluck-cli"] {
        let own = built_features(&["--package", package, "--edges", "normal"]);
        assert!(own.len() > 100, "{package} has {} dependencies, so cargo tree was misread", own.len());
        for (name, features) in own {
            // pyo3 is the wheel's alone, and its switch `extension-module` is thrown by maturin.
            let known = tests.get(&name).cloned().unwrap_or_default();
            for extra in features.difference(&known).filter(|_| !name.starts_with("pyo3")) {
                problems.push(format!("{package} builds {name} with [{extra}], the tests with {known:?}"));
            }
        }
    }
    assert_none(
        problems,
        "the same features everywhere (see python/Cargo.toml), or libp2p is compiled twice",
    );
}

#[test]
fn files_open_with_a_header_and_are_short() {
    let mut problems = Vec::new();
    for (path, text) in tracked(&[".rs", ".py"]) {
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            problems.push(format!("{}: {lines} lines, at most {FILE_LINES_MAX}", path.display()));
        }
        let first = text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!["));
        let header = match path.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => first.is_none_or(|line| line.starts_with("//!")),
            _ => first.is_none_or(|line| {
                line.starts_with("\"\"\"") || line.starts_with("r\"\"\"") || line.starts_with('#')
            }),
        };
        if !header {
            problems.push(format!("{}: does not open with what it is", path.display()));
        }
    }
    assert_none(problems, "files open with a header and stay short");
}

#[test]
fn functions_are_short() {
    let mut problems = Vec::new();
    for (path, text) in tracked(&[".rs", ".py"]) {
        let python = path.extension().is_some_and(|extension| extension == "py");
        let lines: Vec<&str> = text.lines().collect();
        for (start, line) in lines.iter().enumerate() {
            let found = if python { python_function(line) } else { rust_function(line) };
            let Some(name) = found else { continue };
            let length = if python { python_length(&lines, start) } else { rust_length(&lines, start) };
            if length > FUNCTION_LINES_MAX {
                let place = format!("{}:{}", path.display(), start + 1);
                problems.push(format!("{place}: {name} has {length} lines, at most {FUNCTION_LINES_MAX}"));
            }
        }
    }
    assert_none(problems, "functions stay short");
}

fn rust_function(line: &str) -> Option<&str> {
    let code = line.trim_start();
    if code.starts_with("//") || code.starts_with('"') {
        return None;
    }
    let before = code.find("fn ")?;
    let qualifiers = code[..before].split_whitespace().all(|word| {
        word.starts_with("pub") || ["async", "const", "unsafe", "extern", "\"C\"", "default"].contains(&word)
    });
    qualifiers.then(|| code[before + 3..].split(['(', '<']).next().unwrap_or("?"))
}

/// rustfmt puts a function's closing brace alone, at the indentation of its first line.
fn rust_length(lines: &[&str], start: usize) -> usize {
    let indent = lines[start].len() - lines[start].trim_start().len();
    let closing = format!("{}}}", " ".repeat(indent));
    for (offset, line) in lines[start..].iter().enumerate() {
        let declaration_only = line.ends_with(';') && line.len() - line.trim_start().len() == indent;
        let one_line = offset == 0 && line.trim_end().ends_with('}');
        if *line == closing || declaration_only || one_line {
            return offset + 1;
        }
    }
    lines.len() - start
}

fn python_function(line: &str) -> Option<&str> {
    let code = line.trim_start();
    let rest = code.strip_prefix("def ").or_else(|| code.strip_prefix("async def "))?;
    rest.split('(').next()
}

/// Lines from the end of the signature and docstring to the dedent: documentation does not count as length.
fn python_length(lines: &[&str], start: usize) -> usize {
    let indent = lines[start].len() - lines[start].trim_start().len();
    let signature = lines[start..].iter().position(|line| line.trim_end().ends_with(':')).unwrap_or(0);
    let (mut count, mut in_docstring) = (0, false);
    for line in &lines[start + signature + 1..] {
        let text = line.trim();
        if !text.is_empty() && line.len() - line.trim_start().len() <= indent {
            break;
        }
        let quotes = text.matches("\"\"\"").count();
        if quotes == 1 {
            in_docstring = !in_docstring;
        }
        count += usize::from(!in_docstring && quotes == 0);
    }
    count
}

#[test]
fn nothing_names_this_machine_or_is_unfinished() {
    let needles = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("#[ig", "nore"),
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("pytest.mark.x", "fail"),
    ];
    let mut problems = Vec::new();
    for (path, text) in tracked(&[".rs", ".py", ".md", ".toml", ".sh", "Makefile", ".yml", ".html", ".js"]) {
        for (number, line) in text.lines().enumerate() {
            if needles.iter().any(|needle| line.contains(needle)) {
                problems.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none(problems, "no paths of a machine, no unfinished work, no ignored test");
}

/// What only some systems have. A doc comment may name it, code outside `cfg` may not.
const SYSTEM_SPECIFIC: &[&str] = &[
    "signal::unix",
    "signal::windows",
    "os::unix",
    "os::windows",
    "os::linux",
    "os::fd",
    "libc::",
    "\"/proc",
    "\"/dev/",
    "\"/tmp",
    "\"/etc/",
];

/// Lines that use one of those outside an item, a statement or a file under a `cfg` of a system or of tests.
fn unguarded(text: &str) -> Vec<(usize, &str)> {
    let systems = ["unix", "windows", "target_os", "(test)"];
    let attribute = |line: &str, opening: &str| {
        line.trim_start().starts_with(opening) && systems.iter().any(|system| line.contains(system))
    };
    let lines: Vec<&str> = text.lines().collect();
    if lines.iter().any(|line| attribute(line, "#![cfg(")) {
        return Vec::new();
    }
    let (mut found, mut at) = (Vec::new(), 0);
    while at < lines.len() {
        let line = lines[at];
        if attribute(line, "#[cfg(") {
            at += 1 + guarded_length(&lines[at + 1..], line.len() - line.trim_start().len());
            continue;
        }
        let code = !line.trim_start().starts_with("//");
        if code && SYSTEM_SPECIFIC.iter().any(|name| line.contains(name)) {
            found.push((at + 1, line.trim()));
        }
        at += 1;
    }
    found
}

/// How many lines an attribute of this indentation governs: rustfmt ends an item or a statement at its own indentation.
fn guarded_length(lines: &[&str], indent: usize) -> usize {
    let ends = |line: &&str| {
        let own = line.trim_start();
        let whole = !own.starts_with("//") && !own.starts_with("#[");
        whole && line.len() - own.len() == indent && own.ends_with([';', '}', ','])
    };
    lines.iter().position(ends).map_or(lines.len(), |last| last + 1)
}

#[test]
fn what_only_some_systems_have_is_under_cfg() {
    let mut problems = Vec::new();
    for (path, text) in tracked(&[".rs"]) {
        let name = path.to_string_lossy().into_owned();
        let shipped =
            name.starts_with("python/src/") || (name.starts_with("crates/") && name.contains("/src/"));
        if shipped {
            let lines = unguarded(&text).into_iter();
            problems.extend(lines.map(|(number, line)| format!("{name}:{number}: {line}")));
        }
    }
    assert_none(problems, "the wheel and the command are built for Linux, macOS and Windows");
}

#[test]
fn the_finder_of_unguarded_code_finds_it() {
    let unix = "use tokio::signal::unix::signal;";
    assert_eq!(unguarded(unix), [(1, unix)]);
    assert_eq!(unguarded(&format!("#[cfg(unix)]\n{unix}\n")), []);
    assert_eq!(unguarded(&format!("#[cfg(unix)]\nuse a::b;\n{unix}\n")), [(3, unix)]);
    assert_eq!(unguarded(&format!("#[cfg(feature = \"x\")]\n{unix}\n")), [(2, unix)]);
    assert_eq!(unguarded(&format!("//! {unix}\n#![cfg(unix)]\n{unix}\n")), []);
    let function =
        "#[cfg(target_os = \"linux\")]\n/// Why.\nfn f(\n    a: u8,\n) {\n    libc::f(a);\n}\nlibc::g();\n";
    assert_eq!(unguarded(function), [(8, "libc::g();")]);
    let statement = "fn f() {\n    #[cfg(unix)]\n    if a {\n        libc::f();\n    }\n    libc::g();\n}\n";
    assert_eq!(unguarded(statement), [(6, "libc::g();")]);
    assert_eq!(unguarded("#[cfg(test)]\nmod tests {\n    use std::os::unix::fs;\n}\n"), []);
    assert_eq!(unguarded("if cfg!(unix) {\n    read(\"/proc/self/stat\");\n}\n").len(), 1);
}

#[test]
fn the_length_counters_count() {
    let rust = ["    pub async fn f(", "        a: u8,", "    ) {", "        g();", "    }", "}"];
    assert_eq!(rust_function(rust[0]), Some("f"));
    assert_eq!(rust_length(&rust, 0), 5);
    assert_eq!(rust_function("// a fn comment"), None);
    assert_eq!(rust_function("let x: fn (u8) = g;"), None);
    let python = [
        "def f(a,",
        "      b):",
        "    \"\"\"Say",
        "    more.\"\"\"",
        "    x = 1",
        "",
        "    return x",
        "y = 2",
    ];
    assert_eq!(python_function(python[0]), Some("f"));
    assert_eq!(python_length(&python, 0), 3);
}
