package main

import (
	"fmt"
	"math/rand"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

const pageBytes = 4096

// pread is pread64(2) without telling Go's scheduler, which would cost as much as the call does when
// the page is there. Nothing else is to be scheduled, or has a thread of its own.
func pread(fd int, buffer []byte, at int64) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall6(syscall.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&buffer[0])), uintptr(len(buffer)), uintptr(at), 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		default:
			return 0, errno
		}
	}
}

func sequential(j *job) (done, error) {
	buffer := make([]byte, j.block)
	j.clock()
	fd, err := syscall.Open(j.path, syscall.O_RDONLY, 0)
	if err != nil {
		return done{}, err
	}
	defer syscall.Close(fd)
	var did done
	for {
		n, err := pread(fd, buffer, did.bytes)
		if err != nil || n == 0 {
			return did, err
		}
		did.bytes += int64(n)
		did.operations++
	}
}

func random(j *job) (done, error) {
	fd, err := syscall.Open(j.path, syscall.O_RDONLY, 0)
	if err != nil {
		return done{}, err
	}
	defer syscall.Close(fd)
	offsets, err := j.offsets(fd, j.block)
	if err != nil {
		return done{}, err
	}
	buffer := make([]byte, j.block)
	var did done
	j.clock()
	for _, at := range offsets {
		n, err := pread(fd, buffer, at)
		if err != nil || n != j.block {
			return did, fmt.Errorf("reading %s at %d: %d bytes: %v", j.path, at, n, err)
		}
		did.bytes += int64(n)
		did.operations++
	}
	return did, nil
}

// offsets are count multiples of unit, at random but alike for one seed, each with a whole unit behind it.
func (j *job) offsets(fd int, unit int) ([]int64, error) {
	var about syscall.Stat_t
	if err := syscall.Fstat(fd, &about); err != nil {
		return nil, err
	}
	units := about.Size / int64(unit)
	if units == 0 {
		return nil, fmt.Errorf("%s has only %d bytes", j.path, about.Size)
	}
	dice, out := rand.New(rand.NewSource(j.seed)), make([]int64, j.count)
	for i := range out {
		out[i] = dice.Int63n(units) * int64(unit)
	}
	return out, nil
}

func mappedInOrder(j *job) (done, error) {
	return mapped(j, func(fd int, size int64) ([]int64, error) {
		out := make([]int64, 0, size/pageBytes)
		for at := int64(0); at < size; at += pageBytes {
			out = append(out, at)
		}
		return out, nil
	})
}

func mappedAtRandom(j *job) (done, error) {
	return mapped(j, func(fd int, _ int64) ([]int64, error) { return j.offsets(fd, pageBytes) })
}

func mapped(j *job, choose func(fd int, size int64) ([]int64, error)) (done, error) {
	fd, err := syscall.Open(j.path, syscall.O_RDONLY, 0)
	if err != nil {
		return done{}, err
	}
	defer syscall.Close(fd)
	var about syscall.Stat_t
	if err := syscall.Fstat(fd, &about); err != nil {
		return done{}, err
	}
	offsets, err := choose(fd, about.Size)
	if err != nil {
		return done{}, err
	}
	j.clock()
	content, err := syscall.Mmap(fd, 0, int(about.Size), syscall.PROT_READ, syscall.MAP_PRIVATE)
	if err != nil {
		return done{}, err
	}
	var sum byte
	for _, at := range offsets {
		sum += content[at]
	}
	// Or the compiler would see that nobody wants it.
	sink = sum
	return done{operations: int64(len(offsets)), bytes: int64(len(offsets)) * pageBytes}, syscall.Munmap(content)
}

var sink byte

func walk(j *job) (done, error) {
	buffer := make([]byte, 32<<10)
	var did done
	j.clock()
	below := []string{j.path}
	for len(below) > 0 {
		directory := below[len(below)-1]
		below = below[:len(below)-1]
		fd, err := syscall.Open(directory, syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
		if err != nil {
			return did, fmt.Errorf("opening %s: %w", directory, err)
		}
		var names []string
		for {
			n, err := syscall.ReadDirent(fd, buffer)
			if err != nil {
				return did, fmt.Errorf("listing %s: %w", directory, err)
			}
			if n == 0 {
				break
			}
			_, _, names = syscall.ParseDirent(buffer[:n], -1, names)
		}
		_ = syscall.Close(fd)
		for _, name := range names {
			path := directory + "/" + name
			var about syscall.Stat_t
			if err := syscall.Lstat(path, &about); err != nil {
				return did, fmt.Errorf("lstat %s: %w", path, err)
			}
			did.operations++
			if about.Mode&syscall.S_IFMT == syscall.S_IFDIR {
				below = append(below, path)
			}
		}
	}
	return did, nil
}

func stat(j *job) (done, error) {
	var did done
	j.clock()
	for _, path := range j.list {
		var about syscall.Stat_t
		if err := syscall.Lstat(path, &about); err != nil {
			return did, fmt.Errorf("lstat %s: %w", path, err)
		}
		did.operations++
	}
	return did, nil
}

// small reads many files; several readers take the next one of the list each.
func small(j *job) (done, error) {
	runtime.GOMAXPROCS(j.readers)
	var next, bytes atomic.Int64
	var failed atomic.Value
	var wait sync.WaitGroup
	reader := func() {
		defer wait.Done()
		runtime.LockOSThread()
		buffer := make([]byte, 64<<10)
		for {
			i := next.Add(1) - 1
			if i >= int64(len(j.list)) {
				return
			}
			n, err := readWhole(j.list[i], buffer)
			if err != nil {
				failed.Store(fmt.Errorf("reading %s: %w", j.list[i], err))
				return
			}
			bytes.Add(n)
		}
	}
	j.clock()
	for range j.readers {
		wait.Add(1)
		go reader()
	}
	wait.Wait()
	if err, ok := failed.Load().(error); ok {
		return done{}, err
	}
	return done{operations: int64(len(j.list)), bytes: bytes.Load()}, nil
}

func readWhole(path string, buffer []byte) (int64, error) {
	fd, err := syscall.Open(path, syscall.O_RDONLY, 0)
	if err != nil {
		return 0, err
	}
	defer syscall.Close(fd)
	var at int64
	for {
		n, err := pread(fd, buffer, at)
		if err != nil {
			return at, err
		}
		if n == 0 {
			return at, nil
		}
		at += int64(n)
	}
}

func execute(j *job) (done, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return done{}, err
	}
	defer null.Close()
	attributes := &syscall.ProcAttr{
		Dir: "/", Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}, Sys: &syscall.SysProcAttr{Chroot: j.path},
	}
	j.clock()
	for range j.count {
		pid, err := syscall.ForkExec(j.program, []string{j.program}, attributes)
		if err != nil {
			return done{}, fmt.Errorf("running %s in %s: %w", j.program, j.path, err)
		}
		var status syscall.WaitStatus
		for {
			_, err = syscall.Wait4(pid, &status, 0, nil)
			if err != syscall.EINTR {
				break
			}
		}
		if err != nil || status.ExitStatus() != 0 {
			return done{}, fmt.Errorf("%s in %s ended with %d: %v", j.program, j.path, status.ExitStatus(), err)
		}
	}
	return done{operations: int64(j.count)}, nil
}

// cpuSeconds is what this process and the children it waited for have used.
func cpuSeconds() float64 {
	var total float64
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var used syscall.Rusage
		if syscall.Getrusage(who, &used) == nil {
			for _, it := range []syscall.Timeval{used.Utime, used.Stime} {
				total += float64(it.Sec) + float64(it.Usec)/1e6
			}
		}
	}
	return total
}
