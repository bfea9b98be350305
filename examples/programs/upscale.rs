// Upscale a picture through the C interface: upscale FOLDER in.ppm out.ppm
use std::{env, ffi::*, fs, process::exit, ptr};

#[repr(C)]
struct Image { size: usize, data: *mut u8, bytes: usize, shape: [i64; 2], strides: [i64; 3], channels: c_int, sample: c_int }

#[link(name = "gdpo")]
extern "C" {
    fn gdpo_load(folder: *const c_char, options: *const c_void, out: *mut *mut c_void) -> c_int;
    fn gdpo_image_packed(data: *mut u8, height: i64, width: i64, sample: c_int) -> Image;
    fn gdpo_upscale(up: *const c_void, source: *const Image, target: *const Image, request: *const c_void) -> c_int;
    fn gdpo_last_error() -> *const c_char;
}

fn check(status: c_int) {
    if status != 0 {
        eprintln!("{}", unsafe { CStr::from_ptr(gdpo_last_error()) }.to_string_lossy());
        exit(1);
    }
}

fn main() {
    let [_, folder, input, output]: [String; 4] = env::args().collect::<Vec<_>>().try_into().expect("FOLDER in.ppm out.ppm");
    let mut file = fs::read(&input).expect(&input);
    let header: Vec<_> = file.splitn(4, |b| b.is_ascii_whitespace()).take(3).map(String::from_utf8_lossy).collect();
    let (width, height): (usize, usize) = (header[1].parse().unwrap(), header[2].parse().unwrap());
    let begin = file.len() - width * height * 3; // of the samples, behind "P6 width height 255"
    let mut out = vec![0u8; width * height * 3 * 16];
    let folder = CString::new(folder).unwrap();
    unsafe {
        let mut up = ptr::null_mut();
        check(gdpo_load(folder.as_ptr(), ptr::null(), &mut up));
        let source = gdpo_image_packed(file[begin..].as_mut_ptr(), height as i64, width as i64, 0);
        let target = gdpo_image_packed(out.as_mut_ptr(), 4 * height as i64, 4 * width as i64, 0);
        check(gdpo_upscale(up, &source, &target, ptr::null()));
    }
    fs::write(&output, [format!("P6\n{} {}\n255\n", 4 * width, 4 * height).into_bytes(), out].concat()).expect(&output);
}
