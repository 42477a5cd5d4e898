// Times the models of this folder on a device that has neither Python nor Node, and writes results.json.
//
//   run [folder [seconds [processor]]]
//
// One file against onnxruntime's C++ API, 1.17 or newer; see README.md for how to build and send it.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kLeastRounds = 3;
constexpr double kSlice = 0.05;

struct Input {
  std::string name, type;
  std::vector<int64_t> shape;
};

struct Model {
  std::string name, file, error;
  std::vector<Input> inputs;
  std::vector<double> times;
};

double Wall() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Processor time of this thread where there is such a clock: it stands still while the device does something else.
double Clock() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec time;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return time.tv_sec + 1e-9 * time.tv_nsec;
#endif
  return Wall();
}

double Median(std::vector<double> numbers) {
  std::sort(numbers.begin(), numbers.end());
  size_t middle = numbers.size() / 2;
  return numbers.size() % 2 ? numbers[middle] : (numbers[middle - 1] + numbers[middle]) / 2;
}

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// plan.txt: "key<TAB>value" lines, and "model<TAB>name<TAB>file<TAB>input type 1,2,3;..." lines.
std::vector<Model> ReadPlan(const std::string& folder, std::map<std::string, std::string>& told) {
  std::ifstream file(folder + "/plan.txt");
  if (!file) throw std::runtime_error("cannot read " + folder + "/plan.txt");
  std::vector<Model> models;
  for (std::string line; std::getline(file, line);) {
    std::vector<std::string> fields = Split(line, '\t');
    if (fields.size() == 2) told[fields[0]] = fields[1];
    if (fields.size() != 4) continue;
    Model model;
    model.name = fields[1];
    model.file = fields[2];
    for (const std::string& one : Split(fields[3], ';')) {
      std::vector<std::string> words = Split(one, ' ');
      Input input{words.at(0), words.at(1), {}};
      for (const std::string& size : Split(words.at(2), ',')) input.shape.push_back(std::stoll(size));
      model.inputs.push_back(input);
    }
    models.push_back(model);
  }
  return models;
}

template <typename T>
Ort::Value Tensor(Ort::AllocatorWithDefaultOptions& allocator, const Input& input) {
  Ort::Value value = Ort::Value::CreateTensor<T>(allocator, input.shape.data(), input.shape.size());
  T* data = value.GetTensorMutableData<T>();
  size_t count = value.GetTensorTypeAndShapeInfo().GetElementCount();
  for (size_t i = 0; i < count; i++) {
    int step = static_cast<int>(i * 37 % 251);
    data[i] = static_cast<T>(input.type == "float32" ? step / 251.0 : input.type == "uint8" ? step : step - 125);
  }
  return value;
}

double Block(Ort::Env& env, const Model& model, const std::string& folder, const std::string& provider) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  options.SetInterOpNumThreads(1);
  options.SetGraphOptimizationLevel(ORT_ENABLE_ALL);
  if (provider != "cpu") options.AppendExecutionProvider(provider, {});
  std::string path = folder + "/" + model.file;
#ifdef _WIN32
  Ort::Session session(env, std::wstring(path.begin(), path.end()).c_str(), options);
#else
  Ort::Session session(env, path.c_str(), options);
#endif
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<Ort::Value> values;
  std::vector<const char*> names, results;
  for (const Input& input : model.inputs) {
    names.push_back(input.name.c_str());
    values.push_back(input.type == "float32" ? Tensor<float>(allocator, input)
                     : input.type == "uint8" ? Tensor<uint8_t>(allocator, input)
                                             : Tensor<int8_t>(allocator, input));
  }
  std::vector<Ort::AllocatedStringPtr> kept;
  for (size_t i = 0; i < session.GetOutputCount(); i++) {
    kept.push_back(session.GetOutputNameAllocated(i, allocator));
    results.push_back(kept.back().get());
  }
  auto run = [&] {
    session.Run(Ort::RunOptions{nullptr}, names.data(), values.data(), values.size(), results.data(), results.size());
  };
  run();
  run();
  std::vector<double> seen;
  for (double end = Wall() + kSlice; seen.size() < 3 || Wall() < end;) {
    double start = Clock();
    run();
    seen.push_back(Clock() - start);
  }
  return Median(seen);
}

std::string Quoted(const std::string& text) {
  std::string found = "\"";
  for (char c : text.substr(0, 300)) {
    if (c == '"' || c == '\\') found += '\\';
    found += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return found + "\"";
}

std::string Architecture() {
#if defined(__aarch64__) || defined(_M_ARM64)
  return "arm64";
#elif defined(__x86_64__) || defined(_M_X64)
  return "x64";
#else
  return "unknown";
#endif
}

std::string Processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    size_t at = line.find(": ");
    if (at != std::string::npos && (line.rfind("model name", 0) == 0 || line.rfind("Hardware", 0) == 0)) {
      return line.substr(at + 2);
    }
  }
  return Architecture();
}

void Write(const std::string& path, std::map<std::string, std::string>& told, const std::vector<Model>& models,
           const std::string& processor, double seconds) {
  std::time_t now = std::time(nullptr);
  char date[16];
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  {
    std::ofstream file(path + ".new");
    file << "{\"version\": " << told["version"] << ", \"table\": " << Quoted(told["table"])
         << ", \"like\": " << Quoted(told["like"]) << ", \"provider\": " << Quoted(told["provider"])
         << ",\n \"date\": \"" << date << "\", \"runtime\": " << Quoted("onnxruntime " + Ort::GetVersionString())
         << ",\n \"machine\": {\"processor\": " << Quoted(processor) << ", \"architecture\": \"" << Architecture()
         << "\", \"cores\": " << std::max(1u, std::thread::hardware_concurrency()) << "},\n \"seconds\": " << seconds
         << ",\n \"times\": {";
    file.precision(9);
    for (size_t i = 0; i < models.size(); i++) {
      file << (i ? ",\n  " : "\n  ") << Quoted(models[i].name) << ": ";
      if (!models[i].error.empty()) {
        file << "{\"error\": " << Quoted(models[i].error) << "}";
        continue;
      }
      for (size_t j = 0; j < models[i].times.size(); j++) file << (j ? ", " : "[") << models[i].times[j];
      file << "]";
    }
    file << "\n }}\n";
    if (!file.flush()) throw std::runtime_error("cannot write " + path);
  }
  std::remove(path.c_str());
  if (std::rename((path + ".new").c_str(), path.c_str()) != 0) throw std::runtime_error("cannot write " + path);
}

}  // namespace

int main(int count, char** words) try {
  std::string folder = count > 1 ? words[1] : ".";
  std::map<std::string, std::string> told;
  std::vector<Model> models = ReadPlan(folder, told);
  double seconds = std::atof(count > 2 ? words[2] : told["seconds"].c_str());
  std::string processor = count > 3 ? words[3] : Processor();
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "kit");
  double start = Wall();
  int rounds = 0;
  for (; rounds < kLeastRounds || (Wall() - start) * (1 + 1.0 / rounds) < seconds; rounds++) {
    for (size_t i = 0; i < models.size(); i++) {
      // By turns from both ends, so that neither form always comes first.
      Model& model = models[rounds % 2 ? models.size() - 1 - i : i];
      if (!model.error.empty()) continue;
      try {
        model.times.push_back(Block(env, model, folder, told["short"]));
      } catch (const std::exception& error) {
        model.error = error.what();
      }
    }
    std::cerr << "round " << rounds + 1 << ", " << static_cast<int>(Wall() - start) << " s\n";
  }
  Write(folder + "/results.json", told, models, processor, Wall() - start);
  std::cout << folder << "/results.json\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
