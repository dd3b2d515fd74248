//! `openapi.yaml` is what the code says. `REWAKE_BLESS=1 cargo test --test api` writes it anew.

use std::path::PathBuf;

fn file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("openapi.yaml")
}

#[test]
fn the_file_is_what_the_routes_say() {
    let generated = rewake::api::openapi().to_yaml().expect("the document has only text keys");
    if std::env::var_os("REWAKE_BLESS").is_some() {
        std::fs::write(file(), &generated).expect("openapi.yaml can be written");
    }
    let kept = std::fs::read_to_string(file()).expect("openapi.yaml is in the repository");
    assert!(kept == generated, "openapi.yaml is out of date: run `REWAKE_BLESS=1 cargo test --test api`");
}

#[test]
fn every_operation_has_an_id_a_tag_and_documented_errors() {
    let document = serde_json::to_value(rewake::api::openapi()).expect("the document is JSON");
    let mut ids = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths is an object") {
        for (method, operation) in item.as_object().expect("a path holds operations") {
            let at = format!("{method} {path}");
            ids.push(operation["operationId"].as_str().expect(&at).to_owned());
            assert!(operation["tags"][0].is_string(), "{at} has no tag");
            assert!(operation["summary"].is_string(), "{at} has no summary");
            let open = operation["security"] == serde_json::json!([{}]);
            assert_eq!(open, !path.starts_with("/v1/"), "{at}: keys guard exactly what is under /v1");
            if !open {
                for status in ["400", "401", "404", "500"] {
                    let body = &operation["responses"][status]["content"]["application/json"]["schema"]["$ref"];
                    assert_eq!(body, "#/components/schemas/ErrorBody", "{at} {status}");
                }
            }
        }
    }
    let all = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), all, "operation ids are unique");
    assert_eq!(document["components"]["securitySchemes"]["key"]["scheme"], "bearer");
}

#[test]
fn every_reference_leads_somewhere() {
    let document = serde_json::to_value(rewake::api::openapi()).expect("the document is JSON");
    let mut references = Vec::new();
    collect(&document, &mut references);
    assert!(references.len() > 30, "the document refers to its schemas");
    for reference in references {
        let pointer = reference.strip_prefix('#').expect("references are local");
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
}

fn collect(value: &serde_json::Value, into: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(map) => {
            into.extend(map.get("$ref").and_then(|reference| reference.as_str()).map(String::from));
            map.values().for_each(|value| collect(value, into));
        }
        serde_json::Value::Array(list) => list.iter().for_each(|value| collect(value, into)),
        _ => {}
    }
}

/// What programs are to tell apart they find in the document.
#[test]
fn every_error_code_is_documented() {
    let document = rewake::api::openapi().to_yaml().expect("the document has only text keys");
    let sources = ["api", "session"].map(|room| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src").join(room));
    let (mut folders, mut codes) = (sources.to_vec(), Vec::new());
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let source = std::fs::read_to_string(&path).expect("a source file");
            let before_tests = source.split("#[cfg(test)]").next().unwrap_or_default();
            for (opening, skipped) in
                [("Wire::new(", 1), ("code: \"", 0), ("code: Some(\"", 0), ("Cow::Borrowed(\"", 0)]
            {
                for after in before_tests.split(opening).skip(1) {
                    let code = after.split('"').nth(skipped).unwrap_or_default();
                    if !code.is_empty() && code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
                        codes.push(code.to_owned());
                    }
                }
            }
        }
    }
    codes.sort();
    codes.dedup();
    assert!(codes.len() > 30, "{codes:?}");
    let missing: Vec<_> = codes.iter().filter(|code| !document.contains(&format!("`{code}`"))).collect();
    assert!(missing.is_empty(), "nobody is told of {missing:?}");
}
