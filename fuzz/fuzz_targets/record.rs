#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata_fuzz_bodies::record(data));
