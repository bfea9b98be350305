// Upscale a picture through the C interface: go run upscale.go FOLDER in.ppm out.ppm
package main

// #cgo pkg-config: gdpo
// #include <gdpo/gdpo.h>
// #include <stdlib.h>
import "C"
import (
	"bufio"
	"fmt"
	"io"
	"log"
	"os"
	"unsafe"
)

func check(status C.gdpo_status) {
	if status != C.GDPO_OK {
		log.Fatal(C.GoString(C.gdpo_last_error()))
	}
}

func main() {
	var magic string
	var width, height, most int
	var up *C.gdpo_upscaler
	file, err := os.Open(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	reader := bufio.NewReader(file)
	fmt.Fscanf(reader, "%s\n%d %d\n%d\n", &magic, &width, &height, &most)
	rgb, _ := io.ReadAll(reader)
	if magic != "P6" || most != 255 || len(rgb) != width*height*3 {
		log.Fatal(os.Args[2], ": not an 8-bit PPM file")
	}
	check(C.gdpo_load(C.CString(os.Args[1]), nil, &up))
	// C memory: a pointer to Go's must not lie in a structure that C is given.
	in, out := C.CBytes(rgb), C.malloc(C.size_t(len(rgb)*16))
	source := C.gdpo_image_packed(in, C.int64_t(height), C.int64_t(width), C.GDPO_U8)
	target := C.gdpo_image_packed(out, C.int64_t(4*height), C.int64_t(4*width), C.GDPO_U8)
	check(C.gdpo_upscale(up, &source, &target, nil))
	result := append([]byte(fmt.Sprintf("P6\n%d %d\n255\n", 4*width, 4*height)), unsafe.Slice((*byte)(out), len(rgb)*16)...)
	if err := os.WriteFile(os.Args[3], result, 0o644); err != nil {
		log.Fatal(err)
	}
}
